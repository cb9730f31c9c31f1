"""Collects the candidate ids of rows, and each role's logits at them, as columns for `actors.decoding.kernels`.

The candidates of a row are the ids in the target's and the guider's top-k slices and the ids whose logits the request
requires, or its grammar. They depend on that row's slices and the request alone and are sorted by id.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actors.api.generation import Role
from actors.decoding import kernels
from actors.decoding.kernels import PADDING, BlockColumns, SentRows
from actors.decoding.vocabulary import RequiredLogits

__all__ = ["PADDING", "BlockLayout", "CandidateBlock", "MissingLogits", "RowSlice", "read_only"]

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


class MissingLogits(NamedTuple):
    """Candidates whose logits a role must look up: rows [n] with counts [n] of them each; the places, and its ids.

    Within a row the ids are ascending.
    """

    rows: Ids
    counts: Ids
    places: Ids
    ids: Ids


class ReceivedColumns(NamedTuple):
    """A message of rows: `kernels.SentRows`, its items (`ROWS_ITEM`), and the first row of each."""

    sent: SentRows
    items: NDArray[Any]
    first_rows: Ids


class Answered(NamedTuple):
    """The items of a message that answer calls, the calls' numbers; and by number their first row, and their rows."""

    items: Ids
    numbers: Ids
    rows: Ids
    counts: Ids


class Stages(NamedTuple):
    """Of the rows of a block: their `RowStage`, and the roles whose slices have arrived, as bits."""

    stage: NDArray[np.uint8]
    arrived: NDArray[np.uint8]


class BlockLayout:
    """Which columns of a block's arrays belong to which role. Blocks of equal rows share it."""

    def __init__(self, required: Mapping[Role, RequiredLogits], widths: Mapping[Role, int], more: int = 0) -> None:
        """required: by role, the primary first. widths: most ids in a role's slice. more: ids that no role proposed."""
        self.roles = {role: number for number, role in enumerate(required)}
        self.widths = [widths[role] for role in required]
        self.slice_ends = np.cumsum(self.widths)
        self.slice_columns = int(self.slice_ends[-1]) + more
        self.groups = [each.groups for each in required.values()]
        self.events = np.concatenate([each.events for each in required.values()])
        self.event_ends = np.cumsum([len(each.events) for each in required.values()])
        events = [0, *self.event_ends.tolist()]
        begins = [end - width for end, width in zip(self.slice_ends.tolist(), self.widths, strict=True)]
        # By role its first column of `slices` and of `folded`, as kernels take them.
        self.first_columns = [np.array(pair) for pair in zip(begins, events, strict=False)]


class CandidateBlock:
    """Slices of B rows by role, and from `merge` on their candidates, W at most for each, with every role's logits.

    ids [B, W]: each row's candidates, ascending, then PADDING. counts [B]: their number. logits [R, B, W] by role, the
    primary first: NaN while a lookup is missing and where the role has no such id. sums [R, B]: logsumexp. tempered
    [B]: the primary's `RowSlice.tempered`. ceiling [B]: the lowest logit of the primary's slice, so an upper bound on
    its logits outside of it.
    """

    def __init__(self, rows: int, layout: BlockLayout) -> None:
        self.roles, self._layout = layout.roles, layout
        self._slices = np.full((rows, layout.slice_columns), -1, np.int64)
        self._slice_logits = np.empty(self._slices.shape)
        self._folded = np.full((rows, len(layout.events)), np.nan)
        self.sums = np.zeros((len(self.roles), rows))
        self.tempered, self.ceiling = np.zeros(rows), np.full(rows, np.inf)
        shape = rows, max(1, layout.slice_columns + len(layout.events))
        self.ids, self.counts = np.empty(shape, np.int64), np.zeros(rows, np.int64)
        self.logits = np.empty((len(self.roles), *shape))
        self._held_by = np.empty(shape, np.uint8)
        self._event_places = np.empty(self._folded.shape, np.int64)
        self._columns = BlockColumns(
            self._slices, self._slice_logits, self._folded, self.sums, self.tempered, self.ceiling
        )

    def __len__(self) -> int:
        return len(self.ids)

    def store(
        self,
        role: Role,
        at: Ids,
        ids: Ids,
        logits: NDArray[Any],
        folded: NDArray[Any],
        sums: NDArray[Any],
        tempered: NDArray[Any],
    ) -> None:
        """Store the slices of a role for the rows `at` [n]: ids, logits [n, k], folded [n, g], sums, tempered [n]."""
        number = self.roles[role]
        begin = int(self._layout.slice_ends[number]) - self._layout.widths[number]
        end = begin + ids.shape[1]
        if end > begin:
            self._slices[at, begin:end], self._slice_logits[at, begin:end] = ids, logits
        if folded.shape[1]:
            last = int(self._layout.event_ends[number])
            self._folded[at, last - folded.shape[1] : last] = folded
        self.sums[number, at] = sums
        if not number:
            self.tempered[at] = tempered
            self.ceiling[at] = logits.min(1) if end > begin else np.inf

    def store_rows(
        self, role: Role, at: Ids, sent: SentRows, source: Ids, part: int, theirs: Ids, temperatures: Floats
    ) -> None:
        """Store rows `source` [n] of a message of a role as the rows `at` [n]. See `kernels.store_rows`."""
        number, layout = self.roles[role], self._layout
        how = layout.groups[number], number, layout.first_columns[number], self._columns
        kernels.store_rows(sent, source, at, part, theirs, temperatures, *how)

    def store_answers(
        self,
        role: Role,
        received: ReceivedColumns,
        answered: Answered,
        k: int,
        theirs: Ids,
        heats: Floats,
        rows: Stages,
    ) -> int:
        """Store the rows with which a role answered calls. See `kernels.store_answers`."""
        number, layout = self.roles[role], self._layout
        groups, columns = layout.groups[number], layout.first_columns[number]
        given = (*received, *answered, k, theirs, heats, groups, number, columns, self._columns, *rows)
        return int(kernels.store_answers(*given))

    def copy_required(self, row: int, other: CandidateBlock, at: int) -> None:
        """Take over the sums and the required logits of row `at` of another block of the same shape."""
        self._folded[row], self.sums[:, row], self.tempered[row] = (
            other._folded[at],
            other.sums[:, at],
            other.tempered[at],
        )

    def copy_slices(self, row: int, other: CandidateBlock, at: int) -> None:
        """Take over all that roles have answered for row `at` of another block, whose columns this one begins with."""
        self.copy_required(row, other, at)
        columns = other._layout.slice_columns
        self._slices[row, :columns], self._slice_logits[row, :columns] = other._slices[at], other._slice_logits[at]
        self.ceiling[row] = other.ceiling[at]

    def propose(self, row: int, ids: Ids) -> None:
        """Make these ids candidates of a row, whatever the roles propose."""
        first = int(self._layout.slice_ends[-1])
        self._slices[row, first : first + len(ids)] = ids

    def slice(self, role: Role, row: int) -> RowSlice:
        """A role's slice of one row, as it was stored."""
        number = self.roles[role]
        last, end = int(self._layout.event_ends[number]), int(self._layout.slice_ends[number])
        columns, first = (
            slice(end - self._layout.widths[number], end),
            int(self._layout.event_ends[number - 1]) if number else 0,
        )
        ids, logits, folded = self._slices[row, columns], self._slice_logits[row, columns], self._folded[row]
        tempered = 0.0 if number else float(self.tempered[row])
        return RowSlice(ids, logits, folded[first:last], float(self.sums[number, row]), tempered)

    def merge(self, at: Ids) -> None:
        """Find the candidates of the rows `at` [n] from the slices stored so far."""
        kernels.merge(
            at,
            self._slices,
            self._slice_logits,
            self._layout.slice_ends,
            self._layout.events,
            self._folded,
            self._layout.event_ends,
            self.ids,
            self.counts,
            self._held_by,
            self.logits,
            self._event_places,
        )

    def add_events(self, role: Role, at: Ids) -> None:
        """Add the events of a role that proposes no candidates, if it answered after the merge."""
        number = self.roles[role]
        columns = slice(int(self._layout.event_ends[number - 1]) if number else 0, int(self._layout.event_ends[number]))
        self.logits[number, at[:, None], self._event_places[at, columns]] = self._folded[at, columns]

    def missing_logits(self, role: Role, at: Ids, theirs: NDArray[np.int64]) -> MissingLogits:
        """The candidates of the rows `at` whose logits must be looked up in a role.

        theirs: by id of the primary the role's id, -1 where the role has none.
        """
        rows, counts = np.empty((2, len(at)), np.int64)
        places, ids = np.empty((2, len(at) * self.ids.shape[1]), np.int64)
        of_role = self.roles[role], theirs
        asked, found = kernels.missing(at, self.ids, self.counts, self._held_by, *of_role, rows, counts, places, ids)
        return MissingLogits(rows[:asked], counts[:asked], places[:found], ids[:found])

    def fill(self, role: Role, rows: Ids, counts: Ids, places: Ids, values: NDArray[np.float32]) -> None:
        """Store the logits of lookups: for rows [n] counts [n] values each, at places."""
        kernels.fill(self.logits, self.roles[role], rows, counts, places, read_only(values))


def read_only(values: NDArray[Any]) -> NDArray[Any]:
    """The same values, as kernels take them: arrays of messages cannot be written to."""
    if values.flags.writeable:
        values = values.view()
        values.flags.writeable = False
    return values
