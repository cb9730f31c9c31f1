"""Chooses the tokens of complete rows, with the log-probabilities that their requests want."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.api.generation import Scores
from actors.api.sampling_params import Sampling
from actors.decoding import kernels
from actors.decoding.candidates import CandidateBlock, Floats, Ids
from actors.decoding.penalties import Adjustments, adjustment_columns
from actors.decoding.scoring import scores_of


@dataclass(frozen=True, slots=True, eq=False)
class Decisions:
    """The tokens chosen for the rows `at` [n] of a block, with W places for candidates each."""

    block: CandidateBlock
    at: Ids
    outcomes: NDArray[np.void]  # [n], `kernels.DECISION`
    filtered: Floats  # [n, W], combined, adjusted, over temperature; -inf where filtered
    scores: Sequence[Scores | None]  # by row, those of its token if the request wants them

    @property
    def ids(self) -> Ids:
        """The candidates [n, W], then PADDING."""
        return self.block.ids[self.at]

    @property
    def counts(self) -> Ids:
        """The number of candidates [n]."""
        return self.block.counts[self.at]

    @property
    def tokens(self) -> Ids:
        """The chosen tokens [n]."""
        return self._column("token")

    @property
    def target_tokens(self) -> Ids:
        """The tokens [n] that the primary alone would choose with the same noise."""
        return self._column("target_token")

    @property
    def outside(self) -> Floats:
        """Estimated probability mass [n] outside the candidates."""
        return self._column("outside")

    @property
    def uncovered(self) -> Floats:
        """The largest mass [n] that a single model has outside the candidates, exact."""
        return self._column("uncovered")

    @property
    def settled(self) -> NDArray[np.bool_]:
        """True [n] if greed, top_p, top_k or min_p keep no id outside, whatever its logit."""
        return self._column("settled")

    @property
    def no_legal_token(self) -> NDArray[np.bool_]:
        """True [n] if no candidate may be chosen; the token means nothing then."""
        return self._column("no_legal_token")

    def _column(self, name: str) -> NDArray[Any]:
        column: NDArray[Any] = self.outcomes[name]
        return column

    def row(self, index: int) -> Decisions:
        """The decision of one row."""
        one = slice(index, index + 1)
        return Decisions(self.block, self.at[one], self.outcomes[one], self.filtered[one], self.scores[one])


def decide(
    block: CandidateBlock,
    at: Ids,
    specs: NDArray[np.void],
    adjustments: Sequence[Adjustments | None] = (),
    listed: Sequence[tuple[int, int] | None] = (),
) -> Decisions:
    """Choose the tokens of the rows `at` [n] of a block.

    specs [n]: `kernels.SPEC`. adjustments: by row the request's bias, penalties and bans; empty if no row has any.
    listed: by row the numbers of likeliest candidates to list with log-probabilities, of the distribution and of each
    model; None for no list, empty if no row has one. Example of one row, alpha 1, greedy:

        candidates   z_target  z_guider  z_base     z     adjusted (token 9 is banned)
        3               2.0       1.0      1.5     1.5     1.5   -> the chosen token is 3
        7               1.0       2.0      2.0     1.0     1.0
        9               1.8       3.0      1.0     3.8    -inf

    The target alone would choose 3, too. Log-probabilities are those before the adjustments.
    """
    outcomes, filtered = np.empty(len(at), kernels.DECISION), np.empty((len(at), block.ids.shape[1]))
    if adjustments:
        specs["adjusted"] = [each is not None for each in adjustments]
    extra = adjustment_columns(adjustments) if adjustments else kernels.no_adjustments(len(at))
    given = block.ids, block.counts, block.logits, block.sums
    kernels.decide(*given, block.tempered, block.ceiling, at, specs, extra, outcomes, filtered)
    scores: list[Scores | None] = [None] * len(at)
    for number, each in enumerate(listed):
        if each is not None:
            spec = specs[number]
            how = int(spec["rule"]), float(spec["alpha"]), int(outcomes["token"][number])
            scores[number] = scores_of(*given, int(at[number]), *how, *each)
    return Decisions(block, at, outcomes, filtered, scores)


def choose(
    ids: Ids, logits: Floats, parameters: Sequence[Sampling], seeds: Iterable[Any], positions: Iterable[Any]
) -> Ids:
    """The chosen id of each row, [B], from all of its ids and logits [B, W], by temperature, filters and noise.

    Ties go to the lowest id. Each row needs a finite logit.
    """
    rows = zip(parameters, seeds, positions, strict=True)
    columns = spec_columns([(kernels.ALONE, 0.0, sampling, seed, position) for sampling, seed, position in rows])
    chosen = np.empty(len(ids), np.int64)
    kernels.choose(np.asarray(ids, np.int64), np.asarray(logits, np.float64), columns, chosen)
    return chosen


def spec_columns(rows: Iterable[tuple[int, float, Sampling, int, int]]) -> NDArray[np.void]:
    """`kernels.SPEC` [n] from the rule, alpha, sampling parameters, seed and position of each row."""
    table = []
    for rule, alpha, s, seed, position in rows:
        penalties = s.repetition_penalty, s.presence_penalty, s.frequency_penalty
        table.append((rule, alpha, s.temperature, s.top_p, s.min_p, s.top_k, seed, position, *penalties, 0))
    return np.array(table, kernels.SPEC)


def compare(sliced: Decisions, whole: Decisions, sampling: Sampling) -> tuple[float, bool]:
    """Compare one row's decision from slices with that from full rows, as an audit does.

    Returns the total variation distance of the two distributions that the token is drawn from, and True if the tokens
    differ. A greedy distribution has one token.
    """
    differs = bool(sliced.tokens[0] != whole.tokens[0])
    if not sampling.temperature:
        return float(differs), differs
    known, all_known = int(sliced.counts[0]), int(whole.counts[0])
    spread = np.full(all_known, -np.inf)
    spread[np.searchsorted(whole.ids[0, :all_known], sliced.ids[0, :known])] = sliced.filtered[0, :known]
    distance = np.abs(_softmax(spread) - _softmax(whole.filtered[0, :all_known]))
    return 0.5 * float(distance.sum()), differs


def _softmax(logits: Floats) -> Floats:
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())
