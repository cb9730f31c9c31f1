"""Accuracies, gains and their significance from right and wrong answers.

A table is an array of rates of right answers in [0, 1], float [problems, columns]: one table for each task, one column
for each compared variant, the same problems in the same rows. Weights follow the paper (arXiv 2507.12759): problems
have equal weight within a task, tasks have equal weight in the average. Resampling draws problems, because the problems
of a task are a random sample, while samples of one problem are not independent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]

LEVEL = 0.95
_DRAWS = 10_000  # of a bootstrap or of signs: the error of an interval's limit is then about 0.02 of its width
_BLOCK = 1_000_000  # numbers drawn at once
_EXACT = 14  # with at most this many differing problems, all 2^n signs are tried


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its bootstrap interval, in the unit of the figure."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean(tables: Sequence[Floats]) -> Floats:
    """Mean over problems, then over tasks: [columns]."""
    average: Floats = np.mean([table.mean(axis=0) for table in tables], axis=0)
    return average


def resampled_means(tables: Sequence[Floats], seed: int = 0) -> Floats:
    """`mean` of problems drawn with replacement within each task: [draws, columns]. Deterministic for a seed.

    All columns use the same drawn problems, so that differences of columns are paired.
    """
    total = np.zeros((_DRAWS, tables[0].shape[1]))
    for number, table in enumerate(tables):
        random = np.random.default_rng([seed, number])
        count = len(table)
        block = max(1, _BLOCK // count)
        for start in range(0, _DRAWS, block):
            rows = random.integers(0, count, (min(block, _DRAWS - start), count))
            for column in range(table.shape[1]):
                total[start : start + len(rows), column] += table[:, column][rows].mean(axis=1)
    return total / len(tables)


def pass_at_1(rates: Sequence[Floats], seed: int = 0) -> Interval:
    """The average rate of right answers. rates: one array [problems] a task."""
    tables = [rate[:, None] for rate in rates]
    return _interval(float(mean(tables)[0]), resampled_means(tables, seed)[:, 0])


def difference(rates: Sequence[Floats], baseline: Sequence[Floats], seed: int = 0) -> Interval:
    """Average of `rates` minus average of `baseline`, in [-1, 1], paired by problem."""
    return pass_at_1([rate - base for rate, base in zip(rates, baseline, strict=True)], seed)


def relative_gain(rates: Sequence[Floats], baseline: Sequence[Floats], seed: int = 0) -> Interval | None:
    """(average - baseline's average) / baseline's average, as in the paper: the gain of averages, not the average of
    gains. None if the baseline is never right. If that happens in resamples, a limit of the interval is infinite."""
    tables = [np.stack([rate, base], axis=1) for rate, base in zip(rates, baseline, strict=True)]
    value, base = mean(tables)
    if base == 0:
        return None
    drawn = resampled_means(tables, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        gains = drawn[:, 0] / drawn[:, 1] - 1
    return _interval(float(value / base - 1), np.where(np.isnan(gains), 0.0, gains))  # 0 / 0: no gain


def significance(rates: Sequence[Floats], baseline: Sequence[Floats], seed: int = 0) -> float:
    """Two-sided p of "neither is better": a paired permutation test, which swaps the two for random problems.

    Exact if few problems differ, otherwise (1 + hits) / (1 + draws) with random signs.
    """
    pairs = zip(rates, baseline, strict=True)
    parts = np.concatenate([(rate - base) / len(rate) for rate, base in pairs])
    parts = parts[parts != 0]
    bar = abs(float(parts.sum())) * (1 - 1e-9)  # sums of other orders differ in the last bits
    if len(parts) <= _EXACT:
        signs = (np.arange(2 ** len(parts))[:, None] >> np.arange(len(parts))) & 1
        return float(np.mean(np.abs((2.0 * signs - 1) @ parts) >= bar))
    random = np.random.default_rng(seed)
    hits, block = 0, max(1, _BLOCK // len(parts))
    for start in range(0, _DRAWS, block):
        signs = random.integers(0, 2, (min(block, _DRAWS - start), len(parts)))
        hits += int(np.sum(np.abs((2.0 * signs - 1) @ parts) >= bar))
    return (1 + hits) / (1 + _DRAWS)


def holm(ps: Sequence[float]) -> list[float]:
    """Each p adjusted for the number of tests (Holm 1979)."""
    adjusted = [0.0] * len(ps)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda place: ps[place])):
        highest = max(highest, min(1.0, ps[place] * (len(ps) - rank)))
        adjusted[place] = highest
    return adjusted


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The probability that k of a problem's samples, drawn without replacement, include a right one.

    1 - C(n-c, k) / C(n, k), unbiased (Chen et al. 2021). Raises ValueError if k exceeds the samples.
    """
    _check_k(samples, k)
    return 1 - comb(samples - right, k) / comb(samples, k)


def majority_at_k(answers: Sequence[str | None], right: Sequence[bool], k: int) -> float:
    """The probability that the most frequent answer of k of a problem's samples, drawn without replacement, is right.

    A tie counts in equal shares: with two leading answers, one of them right, half. A sample without an answer has no
    vote. All right answers count as one answer; wrong answers are distinguished by their text. Raises ValueError if k
    exceeds the samples.
    """
    _check_k(len(answers), k)
    rights = sum(right)
    pairs = list(zip(answers, right, strict=True))
    silent = sum(answer is None and not correct for answer, correct in pairs)
    wrong = Counter(answer for answer, correct in pairs if not correct and answer is not None)
    share = 0.0
    for votes in range(1, min(rights, k) + 1):
        ways = _ways(list(wrong.values()), silent, votes, k - votes)
        share += comb(rights, votes) * sum(count / (1 + ties) for ties, count in enumerate(ways))
    return share / comb(len(answers), k)


def _ways(wrong: Sequence[int], silent: int, most: int, drawn: int) -> list[int]:
    """The number of ways to draw `drawn` samples that are not right, with no wrong answer more than `most` times.

    Entry i counts the ways in which exactly i wrong answers are drawn `most` times.
    """
    table = [[0] * (len(wrong) + 1) for _ in range(drawn + 1)]  # [samples drawn, answers that tie]
    for count in range(min(silent, drawn) + 1):
        table[count][0] = comb(silent, count)
    for samples in wrong:
        grown = [[0] * (len(wrong) + 1) for _ in range(drawn + 1)]
        for had, row in enumerate(table):
            for ties, ways in enumerate(row):
                for votes in range(min(samples, most, drawn - had) + 1) if ways else ():
                    grown[had + votes][ties + (votes == most)] += ways * comb(samples, votes)
        table = grown
    return table[drawn]


def _check_k(samples: int, k: int) -> None:
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k}: of {samples} samples between 1 and {samples} can be drawn")


def _interval(value: float, drawn: Floats) -> Interval:
    """Percentiles; no interpolation, so that infinite values may be among them."""
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
    return Interval(value, float(low), float(high))
