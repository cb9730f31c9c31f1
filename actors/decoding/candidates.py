"""Which ids rows are decided over, and what each role knows of them.

A row's candidates are what its roles put forward: the ids of the target's and of the guider's slice, and the events
that every row must know. They are a function of that row's slices alone, in id order.
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
    """What one role said of one row, in the primary's ids.

    ids, logits [k]: the slice; -1 where the primary has no such id; empty for a role that puts nothing forward.
    folded [g]: logits of the events that the row must know.
    """

    ids: Ids
    logits: NDArray[Any]
    folded: NDArray[Any]
    logsumexp: float


@dataclass(frozen=True, slots=True, eq=False)
class RowProposal:
    """One row's part of a block: what its roles must know, and what they said so far.

    early [k]: the target's logits at the guider's ids, as far as they were asked for before the target answered: NaN
    for those still on their way; asked [k]: which ids these are.
    """

    required: Mapping[Role, RequiredLogits]
    slices: Mapping[Role, RowSlice]
    early: Floats | None = None
    asked: NDArray[np.bool_] | None = None

    @property
    def shape(self) -> tuple[object, ...]:
        """Rows of one shape make a block."""
        kinds = [(role, len(needed.events), role in self.slices) for role, needed in self.required.items()]
        return (*kinds, *(len(part.ids) for part in self.slices.values()), self.early is None)


class CandidateBlock:
    """B rows side by side.

    ids [B, W]: each row's candidates, ascending, then PADDING; inside [B, W]: where they are real. values: per role its
    logits [B, W]; NaN where they are not known (yet), or the role has no such id. logsumexp: per role [B]. ceiling [B]:
    above it lies no logit of the target's outside its slice.
    """

    def __init__(self, rows: Sequence[RowProposal]) -> None:
        """All rows are of one shape."""
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
        self._lacking = {role: self._unproposed() for role in self._roles}
        self._values = {role: np.full((len(rows), self.width + 1), np.nan) for role in self._roles}
        self.logsumexp = {role: np.zeros(len(rows)) for role in self._roles}
        if first.early is not None:
            self._take_early(rows)
        for role in self._roles:
            self._expect(role)
            if role in first.slices:
                self._take(role, [row.slices[role] for row in rows])
        proposed = [row.slices[self._roles[0]].logits for row in rows]
        self.ceiling = _stacked(proposed).min(1) if len(proposed[0]) else np.full(len(rows), np.inf)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def width(self) -> int:
        """W."""
        return int(self.ids.shape[1])

    def values(self, role: Role) -> Floats:
        """[B, W]."""
        return self._values[role][:, :-1]

    def add_slice(self, role: Role, row: int, part: RowSlice) -> None:
        """Take in what a role that puts nothing forward said of one row after the block was made."""
        self.logsumexp[role][row] = part.logsumexp
        self._values[role][row, self._places[row, self._columns["events", role]]] = part.folded

    def early(self, row: int, slots: Ids, values: NDArray[Any]) -> None:
        """The target's logits at so many of the guider's slice come after the block was made."""
        self._values["target"][row, self._places[row, self._columns["slice", "guider"]][slots]] = values

    def missing_logits(self, role: Role, theirs: NDArray[np.int64]) -> tuple[Ids, Ids, Ids]:
        """Rows [n], places [n] and the role's ids [n] of the candidates that a role has and was not asked for.

        theirs: the primary's ids as the role's, -1 where it has none.
        """
        rows, places = np.nonzero(self._lacking[role])
        ids = theirs[self.ids[rows, places]]
        if len(ids) and ids.min() < 0:
            there = ids >= 0
            rows, places, ids = rows[there], places[there], ids[there]
        return rows, places, ids

    def fill(self, role: Role, rows: Ids | int, places: Ids, values: NDArray[Any]) -> None:
        """Take in what was looked up."""
        self._values[role][rows, places] = values

    def _unproposed(self) -> NDArray[np.bool_]:
        lacking: NDArray[np.bool_] = np.ones((len(self.ids), self.width + 1), np.bool_)
        lacking[:, :-1] = self.inside
        lacking[:, -1] = False
        return lacking

    def _expect(self, role: Role) -> None:
        """What a role says of its own accord need not be asked for."""
        for kind in ("events", "slice"):
            if (kind, role) in self._columns:
                np.put_along_axis(self._lacking[role], self._places[:, self._columns[kind, role]], False, 1)

    def _take(self, role: Role, parts: Sequence[RowSlice]) -> None:
        """Slices first, then events: a folded event stands above the logit of its first id."""
        out = self._values[role]
        if ("slice", role) in self._columns:
            logits = _stacked([part.logits for part in parts])
            np.put_along_axis(out, self._places[:, self._columns["slice", role]], logits, 1)
        if parts[0].folded.size:
            folded = _stacked([part.folded for part in parts])
            np.put_along_axis(out, self._places[:, self._columns["events", role]], folded, 1)
        self.logsumexp[role][:] = [part.logsumexp for part in parts]
        out[:, -1] = np.nan

    def _take_early(self, rows: Sequence[RowProposal]) -> None:
        asked = _stacked([row.asked for row in rows if row.asked is not None])
        values = _stacked([row.early for row in rows if row.early is not None])
        places = np.where(asked, self._places[:, self._columns["slice", "guider"]], self.width)
        np.put_along_axis(self._values["target"], places, values, 1)
        np.put_along_axis(self._lacking["target"], places, False, 1)


def group_into_blocks(
    rows: Sequence[RowProposal], make: Callable[[list[int]], CandidateBlock] | None = None
) -> list[tuple[CandidateBlock, list[int]]]:
    """Blocks that hold all of `rows`, each with the indices of its rows in their order. make: one, of such rows."""
    shapes: dict[tuple[object, ...], list[int]] = {}
    for index, row in enumerate(rows):
        shapes.setdefault(row.shape, []).append(index)
    make = make or (lambda indices: CandidateBlock([rows[index] for index in indices]))
    return [(make(indices), indices) for indices in shapes.values()]


def rank_ids(together: Ids) -> tuple[Ids, NDArray[np.bool_], Ids]:
    """[B, N] ids -> [B, W] each row's distinct ids ascending (then PADDING), where they are real, and [B, N] places.

    An id of -1 is nowhere: its place is W.
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
    """[n] B times -> [B, n]."""
    if len(arrays) == 1:
        return arrays[0][None]
    return np.concatenate(arrays).reshape(len(arrays), -1)
