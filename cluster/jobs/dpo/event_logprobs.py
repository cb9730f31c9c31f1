"""The guided distribution on a few events for each position, for training with the guided objective.

The events at a position of an answer are the answer's own token, the k likeliest other tokens of the target, and all
remaining tokens as one event. A model's slice is its log-probabilities of these k + 2 events. The slices of target and
guider base do not change while the guider learns: they are computed once and stored, and no training worker loads
either model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FLOOR = 1e-6  # smallest mass of the remaining tokens; below it rounding errors dominate


@dataclass(frozen=True, slots=True)
class Slices:
    """The stored slices of `n` positions.

    ids: [n, k + 1], int32; the answer's own token, then others by falling target probability.
    fixed: [n, k + 2], float16; log p_target - alpha * log p_guider_base of these tokens and of the rest.
    """

    ids: np.ndarray
    fixed: np.ndarray

    def pack(self) -> bytes:
        """The slices as bytes, for a column of a dataset."""
        return self.ids.astype("<i4").tobytes() + self.fixed.astype("<f2").tobytes()

    @classmethod
    def unpack(cls, packed: bytes, width: int) -> Slices:
        """The inverse of `pack`. width: k. Raises ValueError if the bytes were packed with another width."""
        n, left = divmod(len(packed), 4 * (width + 1) + 2 * (width + 2))
        if left:
            raise ValueError(f"{len(packed)} bytes do not hold slices of width {width}")
        ids = np.frombuffer(packed, "<i4", n * (width + 1)).reshape(n, width + 1)
        fixed = np.frombuffer(packed, "<f2", n * (width + 2), offset=ids.nbytes).reshape(n, width + 2)
        return cls(ids, fixed)


def log_events(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities [n, k + 2] of the distinct tokens `ids` [n, k + 1], and of all other tokens as one event."""
    own = logits.float().log_softmax(-1).gather(-1, ids)
    inside = own.logsumexp(-1, keepdim=True).exp()
    return torch.cat([own, torch.log((1 - inside).clamp(min=FLOOR))], -1)


def others(logits: Tensor, tokens: Tensor, width: int) -> Tensor:
    """The events' ids [n, width + 1]: `tokens` [n], then the likeliest others of `logits` [n, vocabulary]."""
    rows = torch.arange(len(tokens), device=logits.device)
    rest = logits.clone()
    rest[rows, tokens] = -torch.inf
    return torch.cat([tokens[:, None], rest.topk(width, -1).indices], -1)


def guided_log_probs(guider: Tensor, fixed: Tensor, alpha: float) -> Tensor:
    """Normalised log-probabilities [n, k + 2] of z_target + alpha * (z_guider - z_guider_base) on the events.

    guider: log-probabilities of the events. fixed: see Slices. For the event of all remaining tokens, guider and
    guider base enter with their total masses.
    """
    return (fixed.to(guider.dtype) + alpha * guider).log_softmax(-1)
