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


def filter_logits(logits: Floats, parameters: Sequence[Sampling]) -> Floats:
    """Apply temperature, then min_p, top_k and top_p to each row: [B, W] -> [B, W], -inf for filtered ids.

    Greedy rows (temperature 0) pass unchanged. Of equal logits the lowest id ranks first.
    """
    temperature = np.array([p.temperature or 1.0 for p in parameters])
    scaled: Floats = logits / temperature[:, None]
    width = logits.shape[1]
    active = [p.temperature > 0 and (p.top_p < 1 or p.min_p > 0 or 0 < p.top_k < width) for p in parameters]
    if any(active):
        filtered = [p for p, is_active in zip(parameters, active, strict=True) if is_active]
        top_k = np.array([p.top_k or np.iinfo(np.int64).max for p in filtered])
        top_p, min_p = np.array([p.top_p for p in filtered]), np.array([p.min_p for p in filtered])
        scaled[active] = _filter(scaled[active], top_k, top_p, min_p)
    return scaled


def _filter(scaled: Floats, top_k: Ints, top_p: Floats, min_p: Floats) -> Floats:
    order = np.argsort(-scaled, axis=1, kind="stable")
    ranked = np.take_along_axis(scaled, order, 1)
    weights = np.exp(ranked - ranked[:, :1])
    rank = np.arange(scaled.shape[1])
    keep = (rank < top_k[:, None]) & (weights >= min_p[:, None])
    weights = np.where(keep, weights, 0.0)
    cumulative = np.cumsum(weights, 1)
    before = cumulative - weights
    # The first token always stays; others stay while the mass before them is below top_p of what min_p and top_k kept.
    keep &= (before < top_p[:, None] * cumulative[:, -1:]) | (rank == 0)
    kept = np.where(keep, ranked, -np.inf)
    out = np.empty_like(scaled)
    np.put_along_axis(out, order, kept, 1)
    return out


def choose(ids: Ints, logits: Floats, parameters: Sequence[Sampling], seeds: Ints, positions: Ints) -> Ints:
    """The chosen id of each row, [B]. ids, logits: [B, W]. Ties go to the lowest id; each row needs a finite logit."""
    return choose_with_noise(noise_of(ids, parameters, seeds, positions), ids, logits, parameters)


def noise_of(ids: Ints, parameters: Sequence[Sampling], seeds: Ints, positions: Ints) -> Floats | None:
    """The noise [B, W] for choices among `ids` [B, W]; None if every row is greedy."""
    return gumbel(seeds, positions, ids) if any(p.temperature > 0 for p in parameters) else None


def choose_with_noise(noise: Floats | None, ids: Ints, logits: Floats, parameters: Sequence[Sampling]) -> Ints:
    """`choose` with noise that `noise_of` computed before."""
    scores = filter_logits(logits, parameters)
    if noise is not None:
        sampled = [p.temperature > 0 for p in parameters]
        if all(sampled):
            scores += noise  # filtered ids stay at -inf
        else:
            scores[sampled] += noise[sampled]
    return np.asarray(np.take_along_axis(ids, np.argmax(scores, 1)[:, None], 1)[:, 0])
