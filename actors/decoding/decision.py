"""From completed rows to tokens: combine, adjust, estimate what is not seen, choose. Vectorised over rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.decoding.arithmetic import Floats, RoleRows, combine, outside_estimate, total_variation
from actors.decoding.candidates import Dense, Ids, Part, side_by_side
from actors.decoding.parameters import Sampling
from actors.decoding.sampling import choose

Adjust = Callable[[NDArray[np.int64], Floats], None]


@dataclass(frozen=True, slots=True)
class Row:
    """One row to decide: its candidates, what each role knows of them, alpha, and what the request wants.

    seed and position feed the noise. adjust: changes the row's logits in place by the request's history
    (`penalties.adjust`).
    """

    ids: Ids
    target: Part
    guider: Part | None
    guider_base: Part | None
    alpha: float
    sampling: Sampling
    seed: int
    position: int
    adjust: Adjust


@dataclass(frozen=True, slots=True, eq=False)
class Decisions:
    """What B rows came to.

    tokens [B], and alone [B]: what the target by itself had chosen. outside [B]: estimated mass outside the
    candidates. uncovered [B]: the largest exactly known uncovered mass of a single model. stuck [B]: no candidate may
    be chosen. dense and logits [B, W]: the candidates and their adjusted combined logits.
    """

    tokens: NDArray[Any]
    alone: NDArray[Any]
    outside: Floats
    uncovered: Floats
    stuck: NDArray[np.bool_]
    dense: Dense
    logits: Floats


def decide(rows: Sequence[Row], guided: bool) -> Decisions:
    """Decide rows that are all guided, or all decoded by the target alone."""
    alpha = np.array([row.alpha for row in rows])
    dense, counts = side_by_side([row.ids for row in rows]), [len(row.ids) for row in rows]
    target = _role_rows(dense, [row.target for row in rows], counts)
    smalls = [_role_rows(dense, parts, counts) for parts in _small_parts(rows)] if guided else []
    own = np.where(dense.inside, target.logits, -np.inf)
    logits = combine(target, smalls[0], smalls[1], alpha) if guided else own.copy()
    for row, count, ids, combined, alone in zip(rows, counts, dense.ids, logits, own, strict=True):
        row.adjust(ids[:count], combined[:count])
        row.adjust(ids[:count], alone[:count])
    stuck: NDArray[np.bool_] = np.logical_not(np.any(np.isfinite(logits), axis=1))
    logits[stuck] = own[stuck] = 0.0  # decided by nobody: the caller widens the row or gives up
    temperature = np.array([row.sampling.temperature for row in rows])
    ceiling = np.array([row.target.ceiling for row in rows])
    estimate = outside_estimate(logits, alpha, target, *smalls, temperature=temperature, ceiling=ceiling)
    outside = np.where(stuck, 1.0, estimate)
    uncovered = np.max([model.uncovered for model in (target, *smalls)], axis=0)
    tokens, alone_tokens = _choose(rows, dense, logits, own, guided)
    return Decisions(tokens, alone_tokens, outside, uncovered, stuck, dense, logits)


def compare(rows: Sequence[Row], sliced: Decisions, whole: Decisions) -> tuple[Floats, NDArray[np.bool_]]:
    """Hold decisions from slices against those from whole rows: total variation [B], and whether the choice differs."""
    spread = np.full(whole.logits.shape, -np.inf)
    for index in range(len(rows)):
        inside = sliced.dense.inside[index]
        place = np.searchsorted(whole.dense.ids[index], sliced.dense.ids[index, inside])
        spread[index, place] = sliced.logits[index, inside]
    temperature = np.array([row.sampling.temperature or 1.0 for row in rows])
    return total_variation(spread, whole.logits, temperature), sliced.tokens != whole.tokens


def _small_parts(rows: Sequence[Row]) -> tuple[list[Part], list[Part]]:
    return [row.guider for row in rows if row.guider], [row.guider_base for row in rows if row.guider_base]


def _role_rows(dense: Dense, parts: Sequence[Part], counts: Sequence[int]) -> RoleRows:
    logsumexp = np.array([part.logsumexp for part in parts], np.float64)
    return RoleRows(dense.values(parts, counts), dense.inside, logsumexp)


def _choose(
    rows: Sequence[Row], dense: Dense, logits: Floats, own: Floats, guided: bool
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The combined choice and the target's own, by one pass over both."""
    parameters = [row.sampling for row in rows]
    seeds = np.array([row.seed for row in rows], np.uint64)
    positions = np.array([row.position for row in rows], np.uint64)
    if not guided:
        tokens = choose(dense.ids, logits, parameters, seeds, positions)
        return tokens, tokens
    twice = choose(
        np.concatenate([dense.ids, dense.ids]),
        np.concatenate([logits, own]),
        [*parameters, *parameters],
        np.concatenate([seeds, seeds]),
        np.concatenate([positions, positions]),
    )
    return twice[: len(rows)], twice[len(rows) :]
