"""Log-probabilities of a prompt's tokens in the combined distribution, from full rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from actors.api.generation import PromptNote, Role
from actors.decoding.arithmetic import Floats, RoleLogits, combine, log_total
from actors.decoding.candidates import RowSlice
from actors.decoding.scoring import likeliest
from actors.decoding.vocabulary import RequiredLogits


def spread(slices: Sequence[RowSlice], required: RequiredLogits, width: int) -> RoleLogits:
    """A role's full rows [B, width] by ids of the primary; NaN where the role has no such id."""
    logits = np.full((len(slices), width), np.nan)
    for row, part in zip(logits, slices, strict=True):
        ours = part.ids >= 0
        row[part.ids[ours]] = part.logits[ours]
        row[required.events] = part.folded
    sums = np.array([part.logsumexp for part in slices])
    return RoleLogits(logits, ~np.isnan(logits), sums)


def prompt_notes(
    rows: Mapping[Role, RoleLogits], alpha: float, tokens: Sequence[int], events: Sequence[int], top: int
) -> list[PromptNote]:
    """The log-probabilities (nats) of the B tokens that follow B rows, each with its `top` likeliest candidates.

    rows: those of the primary first, then of guider and guider base if they take part. events: by token the id that
    represents it in rows (all end ids are represented by the first).
    """
    primary, *small = rows.values()
    alphas = np.full(len(tokens), alpha)
    combined = np.where(primary.inside, primary.logits, -np.inf)
    if small:
        guider, guider_base = small
        combined = combine(primary, guider, guider_base, alphas)
    logprobs: Floats = combined - log_total(combined, alphas, primary, *small)[:, None]
    ids: NDArray[np.int64] = np.arange(logprobs.shape[1])
    notes = []
    for row, token, event in zip(logprobs, tokens, events, strict=True):
        rank = 1 + int(np.count_nonzero(row > row[event]))
        notes.append(PromptNote(token, float(row[event]), rank, likeliest(ids, row, top)))
    return notes
