"""Samples tokens so that a choice depends on the row, the seed and the position alone.

This is the Gumbel-max trick with counter-based noise: the choice is the argmax over allowed ids v of
z(v) / T + g(seed, position, v), where g = -log(-log(u)) and u is a pure integer hash. Rows are [B, W]: candidate ids
ascending, logits -inf in the padding. Sums run left to right in float64 (`cumsum`), so neither padding nor the other
rows of a batch change a bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.api.sampling_params import Sampling
from actors.decoding.arithmetic import OutsideBounds

Floats = NDArray[np.float64]
Ints = NDArray[Any]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`hashing.mix64`, vectorised."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(seeds: Ints, positions: Ints, ids: Ints) -> Floats:
    """Uniform noise [B, W] of (seed [B], position [B], id [B, W]): 52 bits, strictly inside (0, 1)."""
    with np.errstate(over="ignore"):
        row = _mix64(seeds.astype(np.uint64) + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
        bits = _mix64(row[:, None] + (ids.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    u: Floats = ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return u


def gumbel(seeds: Ints, positions: Ints, ids: Ints) -> Floats:
    """Standard Gumbel noise [B, W] of (seed [B], position [B], id [B, W])."""
    noise: Floats = -np.log(-np.log(uniform(seeds, positions, ids)))
    return noise


def filter_logits(
    logits: Floats, parameters: Sequence[Sampling], outside: OutsideBounds | None = None
) -> tuple[Floats, NDArray[np.bool_]]:
    """Apply temperature, then min_p, top_k and top_p to each row: [B, W] -> [B, W], -inf for filtered ids.

    Greedy rows (temperature 0) pass unchanged. Of equal logits the lowest id ranks first.
    outside: bounds on the ids that are not in `logits`; None: there are none.
    Also returns settled [B]: True if the whole row would keep the same ids, so that the same one would be chosen.
    """
    temperature = np.array([p.temperature or 1.0 for p in parameters])
    scaled: Floats = logits / temperature[:, None]
    sampled = np.array([p.temperature > 0 for p in parameters])
    if outside is None:
        settled, ceiling = np.ones(len(logits), np.bool_), np.full(len(logits), -np.inf)
    else:
        ceiling = outside.ceiling / temperature
        settled = ~sampled & (np.max(scaled, 1) > ceiling)
    active = np.array([p.filters for p in parameters])
    if active.any():
        chosen = [p for p in parameters if p.filters]
        top_k = np.array([p.top_k or np.iinfo(np.int64).max for p in chosen])
        filters = top_k, np.array([p.top_p for p in chosen]), np.array([p.min_p for p in chosen])
        none = np.full(len(chosen), -np.inf)
        bounds = (none, none) if outside is None else (outside.least[active], outside.most[active])
        scaled[active], settled[active] = _filter(scaled[active], *filters, ceiling[active], *bounds)
    return scaled, settled


def _filter(
    scaled: Floats, top_k: Ints, top_p: Floats, min_p: Floats, ceiling: Floats, least: Floats, most: Floats
) -> tuple[Floats, NDArray[np.bool_]]:
    """Filter rows [B, W] of logits over temperature. ceiling, least, most [B]: `OutsideBounds` over temperature.

    Example: top_p .9, weights 60, 30, 4, and outside at least 1, at most 6, none heavier than 4. The whole row weighs
    95 to 100, so its nucleus reaches to a weight of 85.5 to 90 and holds the ids of 60 and 30 in both cases: settled.
    With at most 10 outside it reaches to 93.6, and may hold the id of 4 or one outside: not settled.
    """
    order = np.argsort(-scaled, axis=1, kind="stable")
    ranked = np.take_along_axis(scaled, order, 1)
    top = ranked[:, :1]
    weights = np.exp(ranked - top)
    rank = np.arange(scaled.shape[1])
    known = ranked > ceiling[:, None]  # these rank before every id outside
    # min_p or top_k leave nothing outside: then top_p, which comes after them, needs no id outside either.
    closed = (np.count_nonzero(known, 1) >= top_k) | (top[:, 0] + np.log(np.maximum(min_p, 1e-300)) > ceiling)
    keep = (rank < top_k[:, None]) & (weights >= min_p[:, None])
    weights = np.where(keep, weights, 0.0)
    cumulative = np.cumsum(weights, 1)
    before = cumulative - weights
    inside = cumulative[:, -1]
    cut_before = (top_k < np.iinfo(np.int64).max) | (min_p > 0)  # they may filter ids outside, which then weigh nothing
    totals = [
        inside + np.where(closed | absent, 0.0, np.exp(np.minimum(bound - top[:, 0], 700.0)))
        for bound, absent in ((least, cut_before), (most, False))
    ]
    # The first token always stays; others stay while the mass before them is below top_p of what min_p and top_k kept.
    kept = [keep & ((before < (top_p * total)[:, None]) | (rank == 0)) for total in totals]
    within = np.cumsum(np.where(known, weights, 0.0), 1)[:, -1] >= top_p * totals[1]
    settled = closed | ((top_p < 1) & within & np.all(kept[0] == kept[1], axis=1))
    out = np.empty_like(scaled)
    np.put_along_axis(out, order, np.where(kept[0], ranked, -np.inf), 1)
    return out, settled


def choose(ids: Ints, logits: Floats, parameters: Sequence[Sampling], seeds: Ints, positions: Ints) -> Ints:
    """The chosen id of each row, [B]. ids, logits: [B, W]. Ties go to the lowest id; each row needs a finite logit."""
    filtered, _ = filter_logits(logits, parameters)
    return choose_filtered(noise_of(ids, parameters, seeds, positions), ids, filtered, parameters)


def noise_of(ids: Ints, parameters: Sequence[Sampling], seeds: Ints, positions: Ints) -> Floats | None:
    """The noise [B, W] for choices among `ids` [B, W]; None if every row is greedy."""
    return gumbel(seeds, positions, ids) if any(p.temperature > 0 for p in parameters) else None


def choose_filtered(noise: Floats | None, ids: Ints, filtered: Floats, parameters: Sequence[Sampling]) -> Ints:
    """The chosen id of each row, [B], from `noise_of` and `filter_logits` [B, W]. Greedy rows get no noise."""
    scores = filtered
    if noise is not None:
        sampled = np.array([p.temperature > 0 for p in parameters])
        scores = filtered + (noise if sampled.all() else np.where(sampled[:, None], noise, 0.0))
    return np.asarray(np.take_along_axis(ids, np.argmax(scores, 1)[:, None], 1)[:, 0])
