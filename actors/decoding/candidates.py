"""Collects the candidate ids of rows, and each role's logits at them.

The candidates of a row are the ids in the target's and the guider's top-k slices and the ids whose logits the request
requires. They depend on that row's slices alone and are sorted by id.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.api.generation import Role
from actors.decoding import kernels
from actors.decoding.kernels import PADDING
from actors.decoding.vocabulary import RequiredLogits

__all__ = ["PADDING", "CandidateBlock", "RowProposal", "RowSlice", "group_into_blocks"]

Ids = NDArray[Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class RowSlice:
    """One role's top-k slice of one row, in ids of the primary. Empty for a role that proposes no candidates."""

    ids: Ids  # [k], -1 where the primary has no such id
    logits: NDArray[Any]  # [k]
    folded: NDArray[Any]  # [g], logits of the required events
    logsumexp: float
    tempered: float = 0.0  # logsumexp of the logits over the request's temperature; read of the primary's rows only


@dataclass(frozen=True, slots=True, eq=False)
class RowProposal:
    """One row's part of a block: the logits that it requires and the slices received so far."""

    required: Mapping[Role, RequiredLogits]
    slices: Mapping[Role, RowSlice]

    @property
    def shape(self) -> tuple[object, ...]:
        """Key by which rows are grouped: a block holds rows of equal shape."""
        kinds = [(role, len(needed.events), role in self.slices) for role, needed in self.required.items()]
        return (*kinds, *(len(part.ids) for part in self.slices.values()))


class CandidateBlock:
    """The candidates of B rows, W at most for each, and every role's logits at them.

    ids [B, W]: each row's candidates, ascending, then PADDING. counts [B]: their number. sums [R, B]: logsumexp by
    role, the primary first. tempered [B]: the target's `RowSlice.tempered`. ceiling [B]: the lowest logit of the
    target's slice, so an upper bound on its logits outside of it.
    """

    def __init__(self, rows: Sequence[RowProposal]) -> None:
        """rows: of equal `shape`."""
        first = rows[0]
        self._roles = {role: number for number, role in enumerate(first.required)}
        primary = next(iter(self._roles))
        parts = [[row.slices.get(role, _NO_SLICE) for row in rows] for role in self._roles]
        slices, slice_ends = _side_by_side([[part.ids for part in of_role] for of_role in parts], np.int64)
        slice_logits, _ = _side_by_side([[part.logits for part in of_role] for of_role in parts], np.float64)
        events, self._event_ends = _side_by_side(
            [[row.required[role].events for row in rows] for role in self._roles], np.int64
        )
        shape = len(rows), max(1, slices.shape[1] + events.shape[1])
        self.ids, self.counts = np.empty(shape, np.int64), np.empty(len(rows), np.int64)
        self._known = np.empty(shape, np.uint8)
        self._logits = np.empty((len(self._roles), *shape))
        self._event_places = np.empty(events.shape, np.int64)
        result = self.ids, self.counts, self._known, self._logits, self._event_places
        kernels.merge(slices, slice_logits, slice_ends, events, self._event_ends, *result)
        self.sums = np.zeros((len(self._roles), len(rows)))
        for role in self._roles:
            if role in first.slices:
                for number, row in enumerate(rows):
                    self._store(self._roles[role], number, row.slices[role])
        self.tempered = np.array([row.slices[primary].tempered for row in rows])
        proposed = slice_logits[:, : slice_ends[0]]
        self.ceiling = proposed.min(1) if proposed.shape[1] else np.full(len(rows), np.inf)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def logits(self) -> Floats:
        """Logits [R, B, W] by role; NaN while a lookup is missing and where the role has no such id."""
        return self._logits

    def values(self, role: Role) -> Floats:
        """Logits [B, W] of a role."""
        return self.logits[self._roles[role]]

    def add_slice(self, role: Role, row: int, part: RowSlice) -> None:
        """Store the sums and events of a role's answer. A folded event replaces the logit of its first id."""
        self._store(self._roles[role], row, part)

    def missing_logits(self, role: Role, theirs: NDArray[np.int64]) -> tuple[Ids, Ids, Ids]:
        """Rows [n], places [n] and the role's ids [n] of the candidates whose logits must be looked up in a role.

        theirs: by id of the primary the role's id, -1 where the role has none. Within a row the ids are ascending.
        """
        rows, places, ids = (np.empty(self.ids.size, np.int64) for _ in range(3))
        found = kernels.missing(self.ids, self.counts, self._known, self._roles[role], theirs, rows, places, ids)
        return rows[:found], places[:found], ids[:found]

    def _store(self, number: int, row: int, part: RowSlice) -> None:
        self.sums[number, row] = part.logsumexp
        if len(part.folded):
            end = self._event_ends[number]
            self._logits[number, row, self._event_places[row, end - len(part.folded) : end]] = part.folded

    def fill(self, role: Role, rows: Ids | int, places: Ids, values: NDArray[Any]) -> None:
        """Store the logits of a lookup."""
        self._logits[self._roles[role]][rows, places] = values


def group_into_blocks(
    rows: Sequence[RowProposal], make: Callable[[list[int]], CandidateBlock] | None = None
) -> list[tuple[CandidateBlock, list[int]]]:
    """Blocks that hold all of `rows`, each with the indices of its rows. make: builds a block from such indices."""
    shapes: dict[tuple[object, ...], list[int]] = {}
    for index, row in enumerate(rows):
        shapes.setdefault(row.shape, []).append(index)
    make = make or (lambda indices: CandidateBlock([rows[index] for index in indices]))
    return [(make(indices), indices) for indices in shapes.values()]


_NO_SLICE = RowSlice(np.zeros(0, np.int64), np.zeros(0), np.zeros(0), 0.0)


def _side_by_side(by_role: Sequence[Sequence[NDArray[Any]]], dtype: type) -> tuple[NDArray[Any], Ids]:
    """R times B arrays [n_r] -> [B, sum of n_r], and the column [R] at which each role's part ends."""
    stacked = [np.concatenate(arrays).reshape(len(arrays), -1) for arrays in by_role]
    ends = np.cumsum([part.shape[1] for part in stacked])
    return np.concatenate(stacked, axis=1, dtype=dtype, casting="unsafe"), ends
