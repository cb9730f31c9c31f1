"""Chooses the tokens of complete rows, with the log-probabilities that their requests want."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.api.generation import EXPLAINED, Scores
from actors.api.sampling_params import Sampling
from actors.decoding import kernels
from actors.decoding.candidates import CandidateBlock, Floats, Ids
from actors.decoding.penalties import Adjustments, adjustment_columns
from actors.decoding.scoring import scores_of


@dataclass(frozen=True, slots=True)
class RowSamplingSpec:
    """Sampling parameters of one row. The noise depends on seed, position and token id.

    adjustments: the request's bias, penalties and bans for this row; None if there are none. top: number of likeliest
    candidates to list with log-probabilities; None for no list. explain: list those of each model, too.
    """

    alpha: float
    sampling: Sampling
    seed: int
    position: int
    adjustments: Adjustments | None
    top: int | None = None
    explain: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Decisions:
    """The tokens chosen for n rows, with W places for candidates each."""

    outcomes: NDArray[np.void]  # [n], `kernels.DECISION`
    ids: Ids  # [n, W], the candidates, then PADDING
    filtered: Floats  # [n, W], combined, adjusted, over temperature; -inf where filtered
    counts: Ids  # [n], number of candidates
    scores: Sequence[Scores | None]  # by row, those of its token if the request wants them

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
        return Decisions(*(getattr(self, field.name)[index : index + 1] for field in fields(self)))


def decide(block: CandidateBlock, rows: Sequence[int], specs: Sequence[RowSamplingSpec], guided: bool) -> Decisions:
    """Choose the tokens of n rows of a block, all guided or all decoded by the primary alone.

    rows: indices into the block; specs: one for each. Example of one row, alpha 1, greedy:

        candidates   z_target  z_guider  z_base     z     adjusted (token 9 is banned)
        3               2.0       1.0      1.5     1.5     1.5   -> the chosen token is 3
        7               1.0       2.0      2.0     1.0     1.0
        9               1.8       3.0      1.0     3.8    -inf

    The target alone would choose 3, too. Log-probabilities are those before the adjustments.
    """
    at = np.array(rows, np.int64)
    rule = kernels.GUIDED if guided else kernels.ALONE
    columns = spec_columns([(rule, each.alpha, each.sampling, each.seed, each.position) for each in specs])
    adjustments = [each.adjustments for each in specs]
    columns["adjusted"] = [each is not None for each in adjustments]
    outcomes, filtered = np.empty(len(at), kernels.DECISION), np.empty((len(at), block.ids.shape[1]))
    given = block.ids, block.counts, block.logits, block.sums
    extra = adjustment_columns(adjustments)
    kernels.decide(*given, block.tempered, block.ceiling, at, columns, extra, outcomes, filtered)
    scores = [
        None
        if each.top is None
        else scores_of(*given, row, rule, each.alpha, int(outcome), each.top, EXPLAINED if each.explain else 0)
        for row, each, outcome in zip(rows, specs, outcomes["token"], strict=True)
    ]
    return Decisions(outcomes, block.ids[at], filtered, block.counts[at], scores)


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
