"""Log-probabilities of a prompt's tokens in the combined distribution, from full rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from actors.api.generation import PromptNote, Role
from actors.decoding import kernels
from actors.decoding.candidates import Floats, RowSlice
from actors.decoding.scoring import combined_logprobs, likeliest
from actors.decoding.vocabulary import RequiredLogits


def spread(slices: Sequence[RowSlice], required: RequiredLogits, width: int) -> tuple[Floats, Floats]:
    """A role's full rows [B, width] by ids of the primary, NaN where the role has no such id, and logsumexp [B]."""
    logits = np.full((len(slices), width), np.nan)
    for row, part in zip(logits, slices, strict=True):
        ours = part.ids >= 0
        row[part.ids[ours]] = part.logits[ours]
        row[required.events] = part.folded
    return logits, np.array([part.logsumexp for part in slices])


def prompt_notes(
    rows: Mapping[Role, tuple[Floats, Floats]], alpha: float, tokens: Sequence[int], events: Sequence[int], top: int
) -> list[PromptNote]:
    """The log-probabilities (nats) of the B tokens that follow B rows, each with its `top` likeliest candidates.

    rows: of `spread`, those of the primary first, then of guider and guider base if they take part. events: by token
    the id that represents it in rows (all end ids are represented by the first).
    """
    logits, sums = (np.stack(parts) for parts in zip(*rows.values(), strict=True))
    width, rule = logits.shape[2], kernels.GUIDED if len(logits) > 1 else kernels.ALONE
    ids: NDArray[np.int64] = np.arange(width)
    notes = []
    for row, (token, event) in enumerate(zip(tokens, events, strict=True)):
        logprobs = combined_logprobs(logits, sums, row, width, rule, alpha)
        rank = 1 + int(np.count_nonzero(logprobs > logprobs[event]))
        notes.append(PromptNote(token, float(logprobs[event]), rank, likeliest(ids, logprobs, top)))
    return notes
