"""The sentences and tables of a report, shared by the HTML page and Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from actors.api.generation import ROLES
from cluster.jobs.statistics import Interval
from cluster.jobs.summary import AVERAGE, Score, Summary

SURE = 0.05  # a difference with a smaller p counts as significant
UNKNOWN = "–"


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text cells. The first two columns are names, the others figures. notes: sentences below it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def tables(summary: Summary) -> list[Table]:
    """The tables of a report in their order."""
    found = [accuracy(summary), several(summary), costs(summary), behaviour(summary)]
    return [table for table in found if len(table.header) > 2]  # `several` is empty with one answer to each problem


def accuracy(summary: Summary) -> Table:
    """pass@1 with its interval, the gain over the target, and its significance."""
    columns: dict[str, Callable[[Score], str]] = {
        "pass@1 [95 %]": lambda score: _rate_interval(score.pass_at_1),
        "gain over target [95 %]": lambda score: gain(score.gain),
        "points [95 %]": lambda score: _points(score.difference),
        "p": lambda score: UNKNOWN if score.p is None else p_value(score.p),
    }
    notes = [
        "Intervals: bootstrap over problems, paired with the target for gain and points. Gain: relative gain of the "
        "averages. p: paired permutation test over problems, two-sided, adjusted (Holm) for all guided settings.",
    ]
    return _table(summary, "Right answers, in %", columns, notes)


def several(summary: Summary) -> Table:
    """pass@k and maj@k for every k for which all problems of a task have enough samples."""
    ks = sorted({k for scores in summary.scores.values() for score in scores for k in score.pass_at if k > 1})
    columns: dict[str, Callable[[Score], str]] = {}
    for k in ks:
        columns[f"pass@{k}"] = partial(_at, "pass_at", k)
    for k in ks:
        columns[f"maj@{k}"] = partial(_at, "majority_at", k)
    notes = [
        "pass@k: one of k answers is right (unbiased). maj@k: the most frequent of k answers is right, ties shared, "
        "expected over all draws of k."
    ]
    return _table(summary, "Right with several answers, in %", columns, notes)


def costs(summary: Summary) -> Table:
    """Tokens, time and GPU time of an answer, and of a right answer."""
    columns: dict[str, Callable[[Score], str]] = {
        "tokens": lambda score: _amount(score.cost.tokens),
        "of them thinking": lambda score: _amount(score.cost.reasoning_tokens or None),
        "truncated": lambda score: _percent(score.cost.truncated),
        "guided": lambda score: _percent(score.cost.guided),
        "changed": lambda score: _percent(score.cost.changed),
        "tokens / right": lambda score: _amount(score.per_right(score.cost.tokens)),
        "s": lambda score: _amount(score.cost.seconds),
        "s / right": lambda score: _amount(score.per_right(score.cost.seconds)),
    }
    if _on_gpu(summary):
        columns["GPU-s"] = lambda score: _amount(score.cost.gpu_seconds)
        columns["GPU-s / right"] = lambda score: _amount(score.per_right(score.cost.gpu_seconds))
    notes = [
        "Means over answers, and the same per right answer. In %: truncated answers (at the limit of tokens), guided "
        "tokens, and changed tokens, for which the target alone would have chosen another token.",
        f"Seconds are from the request to the last token{_concurrency_note(summary)}. {_gpu_note(summary)}",
    ]
    return _table(summary, "What an answer takes", columns, notes)


def behaviour(summary: Summary) -> Table:
    """Occurrences of each reasoning behaviour per 1,000 words."""
    columns: dict[str, Callable[[Score], str]] = {
        "words": lambda score: _amount(score.behaviours.words / score.samples),
        "branching": lambda score: f"{score.behaviours.per_mille(score.behaviours.branching):.2f}",
        "backtracking": lambda score: f"{score.behaviours.per_mille(score.behaviours.backtracking):.2f}",
        "self-verification": lambda score: f"{score.behaviours.per_mille(score.behaviours.verification):.2f}",
    }
    notes = ["Occurrences of each behaviour's words and phrases per 1,000 words. Words: the mean length of an answer."]
    return _table(summary, "How answers reason", columns, notes)


def verdict(summary: Summary) -> str:
    """The conclusion of the report: whether guidance helps, in one to three sentences."""
    best, target = summary.best, next((s for s in summary.overall if s.variant.mode == "target"), None)
    if best is None:
        return "Nothing was guided."
    if target is None or best.p is None or best.difference is None:
        return f"{_name(best)} is right in {_rate_interval(best.pass_at_1)} % of answers; the target alone did not run."
    shown = (
        f"{_name(best)} is right in {_rate_interval(best.pass_at_1)} % of answers, the target alone in "
        f"{_rate_interval(target.pass_at_1)} %: {gain(best.gain)} relative, p {p_value(best.p, equal='= ')}."
    )
    settings = len(summary.steered)
    if settings > 1:
        shown += f" As the best of {settings} settings it is likely overestimated: confirm it on other problems."
    if best.p >= SURE:
        return f"Guidance is not shown to help. {shown}"
    return f"{'Guidance helps.' if best.difference.value > 0 else 'Guidance hurts.'} {shown}"


def completeness(summary: Summary) -> str:
    """A sentence with the number of answers, and of missing ones."""
    if summary.expected is None or summary.samples == summary.expected:
        return f"{summary.samples:,} answers."
    return f"Not finished: the figures are from {summary.samples:,} of {summary.expected:,} answers."


def gain(value: Interval | None) -> str:
    """A relative gain with its interval, in %."""
    if value is None:
        return UNKNOWN
    return f"{100 * value.value:+.1f} % [{_signed(100 * value.low)}, {_signed(100 * value.high)}]"


def p_value(p: float, equal: str = "") -> str:
    """p with three decimals, or "< 0.001". equal: text before a p that is not such a bound."""
    return "< 0.001" if p < 0.001 else f"{equal}{p:.3f}"


def task_title(task: str, summary: Summary) -> str:
    """The name of a task in tables and plots."""
    return f"average of {len(summary.scores) - 1}" if task == AVERAGE else task


def _table(summary: Summary, title: str, columns: dict[str, Callable[[Score], str]], notes: Sequence[str]) -> Table:
    rows = tuple(
        (task_title(task, summary), str(score.variant), *(show(score) for show in columns.values()))
        for task, scores in summary.scores.items()
        for score in scores
    )
    return Table(title, ("task", "mode", *columns), rows, tuple(notes))


def _name(score: Score) -> str:
    name = str(score.variant)
    return name[0].upper() + name[1:]


def _at(field: str, k: int, score: Score) -> str:
    by_k: Mapping[int, float] = getattr(score, field)
    return _percent(by_k.get(k))


def _on_gpu(summary: Summary) -> bool:
    return bool(summary.gpus and any(summary.gpus.values()))


def _gpu_note(summary: Summary) -> str:
    if summary.gpus is None:
        return "GPU-seconds are left out: config.yaml has no service section."
    if not _on_gpu(summary):
        return "The models ran on CPU, so there are no GPU-seconds."
    gpus = ", ".join(f"{role.replace('_', ' ')} {summary.gpus[role]:g}" for role in ROLES)
    return (
        f"GPU-seconds are seconds x GPUs of the participating roles ({gpus}). Concurrent answers share these GPUs, so "
        "this is what an answer occupies, not what it costs alone."
    )


def _concurrency_note(summary: Summary) -> str:
    return f", {summary.concurrency} answers in flight" if summary.concurrency else ""


def _percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{100 * share:.1f}"


def _rate_interval(rate: Interval) -> str:
    return f"{100 * rate.value:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def _points(value: Interval | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{100 * value.value:+.1f} [{_signed(100 * value.low)}, {_signed(100 * value.high)}]"


def _signed(value: float) -> str:
    return f"{value:+.1f}" if math.isfinite(value) else "+∞"


def _amount(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
