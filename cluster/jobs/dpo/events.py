"""The guided distribution on a handful of events: what training with the guided objective needs of the target.

At each position of an answer the events are the answer's own token, the target's likeliest other tokens, and all the
rest as one. A model's slice is its log-probabilities of these. What target and guider base say does not change while
the guider learns, so it is computed once and kept, and no worker that trains holds either model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FLOOR = 1e-6  # least mass of the rest: below it rounding decides


@dataclass(frozen=True, slots=True)
class Slices:
    """What is kept of `n` positions.

    ids: [n, k + 1], int32, the answer's own token first, then others by the target's preference.
    fixed: [n, k + 2], float16, log p_target - alpha * log p_guider_base of these and of the rest.
    """

    ids: np.ndarray
    fixed: np.ndarray

    def pack(self) -> bytes:
        """As one column of a dataset keeps it."""
        return self.ids.astype("<i4").tobytes() + self.fixed.astype("<f2").tobytes()

    @classmethod
    def unpack(cls, packed: bytes, width: int) -> Slices:
        """width: k. Raises ValueError where it was packed with another."""
        n, left = divmod(len(packed), 4 * (width + 1) + 2 * (width + 2))
        if left:
            raise ValueError(f"{len(packed)} bytes are no slices of width {width}")
        ids = np.frombuffer(packed, "<i4", n * (width + 1)).reshape(n, width + 1)
        fixed = np.frombuffer(packed, "<f2", n * (width + 2), offset=ids.nbytes).reshape(n, width + 2)
        return cls(ids, fixed)


def log_events(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities [n, k + 2] of the tokens `ids` [n, k + 1], all different, and of everything else together."""
    own = logits.float().log_softmax(-1).gather(-1, ids)
    inside = own.logsumexp(-1, keepdim=True).exp()
    return torch.cat([own, torch.log((1 - inside).clamp(min=FLOOR))], -1)


def others(logits: Tensor, tokens: Tensor, width: int) -> Tensor:
    """The events' ids [n, width + 1]: `tokens` [n] first, then the likeliest others of `logits` [n, vocabulary]."""
    rows = torch.arange(len(tokens), device=logits.device)
    rest = logits.clone()
    rest[rows, tokens] = -torch.inf
    return torch.cat([tokens[:, None], rest.topk(width, -1).indices], -1)


def guided_log_probs(guider: Tensor, fixed: Tensor, alpha: float) -> Tensor:
    """Normalised log-probabilities [n, k + 2] of z_target + alpha * (z_guider - z_guider_base) on the events.

    guider: its log-probabilities of the events. fixed: see Slices. For the rest as one event the ratio of guider and
    base is that of their masses there.
    """
    return (fixed.to(guider.dtype) + alpha * guider).log_softmax(-1)
