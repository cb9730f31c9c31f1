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
from actors.decoding.vocabulary import RequiredLogits

Ids = NDArray[Any]
Floats = NDArray[np.float64]
PADDING = 1 << 32  # above every id, so that it sorts last


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

    ids [B, W]: each row's candidates, ascending, then PADDING. inside [B, W]: False in the padding. logsumexp: by role
    [B]. tempered [B]: the target's `RowSlice.tempered`. ceiling [B]: the lowest logit of the target's slice, so an
    upper bound on its logits outside of it.
    """

    def __init__(self, rows: Sequence[RowProposal]) -> None:
        """rows: of equal `shape`."""
        first = rows[0]
        self._roles = tuple(first.required)
        columns: list[Ids] = []
        self._columns: dict[tuple[str, Role], slice] = {}
        for role in self._roles:
            parts = [("events", [row.required[role].events for row in rows])]
            if role in first.slices:
                parts.append(("slice", [row.slices[role].ids for row in rows]))
            for kind, arrays in parts:
                begin = sum(column.shape[1] for column in columns)
                columns.append(_stacked(arrays))
                self._columns[kind, role] = slice(begin, begin + columns[-1].shape[1])
        self.ids, self.inside, self._places = rank_ids(np.concatenate(columns, axis=1))
        self._lacking = {role: self._all_candidates() for role in self._roles}
        self._values = {role: np.full((len(rows), self.width + 1), np.nan) for role in self._roles}
        self.logsumexp = {role: np.zeros(len(rows)) for role in self._roles}
        for role in self._roles:
            self._mark_answered(role)
            if role in first.slices:
                self._store_slices(role, [row.slices[role] for row in rows])
        self.tempered = np.array([row.slices[self._roles[0]].tempered for row in rows])
        proposed = [row.slices[self._roles[0]].logits for row in rows]
        self.ceiling = _stacked(proposed).min(1) if len(proposed[0]) else np.full(len(rows), np.inf)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def width(self) -> int:
        """W, the number of columns."""
        return int(self.ids.shape[1])

    def values(self, role: Role) -> Floats:
        """Logits [B, W] of a role; NaN while a lookup is missing and where the role has no such id."""
        return self._values[role][:, :-1]

    def add_slice(self, role: Role, row: int, part: RowSlice) -> None:
        """Store the answer of a role that proposes no candidates, if it came after the block was made."""
        self.logsumexp[role][row] = part.logsumexp
        self._values[role][row, self._places[row, self._columns["events", role]]] = part.folded

    def missing_logits(self, role: Role, theirs: NDArray[np.int64]) -> tuple[Ids, Ids, Ids]:
        """Rows [n], places [n] and the role's ids [n] of the candidates whose logits must be looked up in a role.

        theirs: by id of the primary the role's id, -1 where the role has none.
        """
        rows, places = np.nonzero(self._lacking[role])
        ids = theirs[self.ids[rows, places]]
        if len(ids) and ids.min() < 0:
            exists = ids >= 0
            rows, places, ids = rows[exists], places[exists], ids[exists]
        return rows, places, ids

    def fill(self, role: Role, rows: Ids | int, places: Ids, values: NDArray[Any]) -> None:
        """Store the logits of a lookup."""
        self._values[role][rows, places] = values

    def _all_candidates(self) -> NDArray[np.bool_]:
        lacking: NDArray[np.bool_] = np.zeros((len(self.ids), self.width + 1), np.bool_)
        lacking[:, :-1] = self.inside
        return lacking

    def _mark_answered(self, role: Role) -> None:
        """Mark the candidates that a role's own answer holds, so that they are not looked up."""
        for kind in ("events", "slice"):
            if (kind, role) in self._columns:
                np.put_along_axis(self._lacking[role], self._places[:, self._columns[kind, role]], False, 1)

    def _store_slices(self, role: Role, parts: Sequence[RowSlice]) -> None:
        """Store slices first, then events: a folded event overwrites the logit of its first id."""
        out = self._values[role]
        if ("slice", role) in self._columns:
            logits = _stacked([part.logits for part in parts])
            np.put_along_axis(out, self._places[:, self._columns["slice", role]], logits, 1)
        if parts[0].folded.size:
            folded = _stacked([part.folded for part in parts])
            np.put_along_axis(out, self._places[:, self._columns["events", role]], folded, 1)
        self.logsumexp[role][:] = [part.logsumexp for part in parts]
        out[:, -1] = np.nan


def group_into_blocks(
    rows: Sequence[RowProposal], make: Callable[[list[int]], CandidateBlock] | None = None
) -> list[tuple[CandidateBlock, list[int]]]:
    """Blocks that hold all of `rows`, each with the indices of its rows. make: builds a block from such indices."""
    shapes: dict[tuple[object, ...], list[int]] = {}
    for index, row in enumerate(rows):
        shapes.setdefault(row.shape, []).append(index)
    make = make or (lambda indices: CandidateBlock([rows[index] for index in indices]))
    return [(make(indices), indices) for indices in shapes.values()]


def rank_ids(together: Ids) -> tuple[Ids, NDArray[np.bool_], Ids]:
    """Sort and deduplicate the ids of each row.

    together [B, N], -1 for no id -> ids [B, W] ascending, then PADDING; inside [B, W], False in the padding; places
    [B, N], the column of each given id, W for -1. Example: [[7, 3, -1, 7]] -> [[3, 7]], [[True, True]], [[1, 0, 2, 1]].
    """
    keyed = np.where(together < 0, PADDING, together)
    order = np.argsort(keyed, axis=1)
    ranked = np.take_along_axis(keyed, order, 1)
    first = np.ones(ranked.shape, np.bool_)
    np.not_equal(ranked[:, 1:], ranked[:, :-1], out=first[:, 1:])
    real = ranked < PADDING
    standing = np.cumsum(first & real, 1) - 1
    width = max(int(standing.max(initial=0)) + 1, 1)
    standing = np.where(real, standing, width)
    ids = np.full((len(together), width + 1), PADDING, np.int64)
    np.put_along_axis(ids, standing, ranked, 1)
    places = np.empty_like(order)
    np.put_along_axis(places, order, standing, 1)
    return ids[:, :width], ids[:, :width] < PADDING, places


def _stacked(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """B arrays [n] -> [B, n]."""
    if len(arrays) == 1:
        return arrays[0][None]
    return np.concatenate(arrays).reshape(len(arrays), -1)
