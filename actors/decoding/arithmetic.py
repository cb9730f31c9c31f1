"""The formula over candidates: z = z_target + alpha * (z_guider - z_guider_base)   (arXiv 2507.12759, equation 1).

All arrays are float64; sums run left to right (`cumsum`), so that padding changes no bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_NOISE = 1e-7  # a probability below this is lost in the float32 logsumexp


@dataclass(frozen=True, slots=True, eq=False)
class RoleRows:
    """One role's logits at the candidates [B, W] (NaN: it has no such id) and its rows' logsumexp [B]."""

    logits: Floats
    logsumexp: Floats

    def uncovered(self, inside: NDArray[np.bool_]) -> Floats:
        """[B]: 1 - the probability of the candidates, known exactly because slices carry logsumexp."""
        with np.errstate(invalid="ignore"):
            mass = np.exp(self.logits - self.logsumexp[:, None])
        return 1.0 - np.cumsum(np.where(inside & ~np.isnan(self.logits), mass, 0.0), 1)[:, -1]


def combine(
    target: RoleRows, guider: RoleRows, guider_base: RoleRows, alpha: Floats, inside: NDArray[np.bool_]
) -> Floats:
    """[B, W] combined logits, -inf outside the candidates; alpha is [B].

    Where a small model has no counterpart of an id, guidance is silent: the delta is 0 on log-probabilities, which on
    logits is the difference of the two logsumexp.
    """
    neutral = (guider.logsumexp - guider_base.logsumexp)[:, None]
    delta = guider.logits - guider_base.logits
    combined = target.logits + alpha[:, None] * np.where(np.isnan(delta), neutral, delta)
    return np.where(inside, combined, -np.inf)


def outside_estimate(
    combined: Floats,
    inside: NDArray[np.bool_],
    alpha: Floats,
    target: RoleRows,
    guider: RoleRows | None = None,
    guider_base: RoleRows | None = None,
) -> Floats:
    """[B]: an estimate of the combined distribution's mass outside the candidates.

    Each model's own uncovered mass is exact; the mean shift of the logits out there is taken from the ratio of the
    guider's to the base's. An indicator, not a bound: audits hold it against whole rows.
    """
    log_outside = _log_uncovered(target, inside)
    if guider is not None and guider_base is not None:
        log_outside = log_outside + alpha * (_log_uncovered(guider, inside) - _log_uncovered(guider_base, inside))
    top = np.max(combined, 1)
    weights = np.where(inside, np.exp(combined - top[:, None]), 0.0)
    log_inside = top + np.log(np.cumsum(weights, 1)[:, -1])
    return np.asarray(1.0 / (1.0 + np.exp(np.clip(log_inside - log_outside, -700, 700))))


def _log_uncovered(rows: RoleRows, inside: NDArray[np.bool_]) -> Floats:
    """[B]: log of the sum of exp(logits) outside the candidates."""
    return np.asarray(np.log(np.maximum(rows.uncovered(inside), _NOISE)) + rows.logsumexp)


def total_variation(z: Floats, other: Floats, temperature: NDArray[Any]) -> Floats:
    """[B]: total variation between the softmax of two sets of rows [B, W] at [B] temperatures."""
    distance = np.abs(_softmax(z / temperature[:, None]) - _softmax(other / temperature[:, None]))
    return np.asarray(0.5 * np.cumsum(distance, 1)[:, -1])


def _softmax(z: Floats) -> Floats:
    weights = np.exp(z - np.max(z, 1, keepdims=True))
    return np.asarray(weights / np.cumsum(weights, 1)[:, -1:])
