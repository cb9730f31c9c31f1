"""Calls to model replicas that are in flight, in batches of consecutive ids: extends of windows, and calls for rows."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from actors.api.generation import Role
from actors.coordinator.frames import RowFrame
from actors.decoding.candidates import Ids
from actors.wire.messages import ProtocolError


class Calls:
    """Items of one kind that were sent to one replica of a role, with consecutive ids."""

    __slots__ = ("alive", "first_id", "role")

    def __init__(self, role: Role, count: int) -> None:
        self.role, self.first_id = role, 0
        self.alive = np.ones(count, np.bool_)  # in flight and not forgotten

    def __len__(self) -> int:
        return len(self.alive)

    def among(self, first: int, end: int) -> list[int]:
        """The numbers of the calls in flight from `first` to before `end`."""
        alive = self.alive[first:end]
        return list(range(first, end)) if alive.all() else (first + np.flatnonzero(alive)).tolist()


class Caller(Protocol):
    """A window. awaited: by role whose rows it awaits the extend in flight, None while that must be sent again."""

    awaited: dict[Role, tuple[Any, int] | None]


W = TypeVar("W", bound=Caller)


class ExtendCalls(Calls, Generic[W]):
    """Extends of windows.

    frame: that of all their rows, if each row of a window is that of one more of its drafts; rows [n] is then the first
    row of each window there, and counts [n] their number. details: what the replies are read with otherwise, by number.
    """

    __slots__ = ("counts", "details", "frame", "rows", "windows")

    def __init__(
        self,
        role: Role,
        windows: Sequence[W],
        details: Sequence[Any] = (),
        frame: RowFrame[Any] | None = None,
        rows: Ids | None = None,
        counts: Ids | None = None,
    ) -> None:
        super().__init__(role, len(windows))
        self.windows, self.details, self.frame = windows, details, frame
        self.rows, self.counts = rows, counts


class Sink(Protocol):
    """Stores the logits of lookups: for rows [n] counts [n] values each, at places."""

    def __call__(self, rows: Ids, counts: Ids, places: Ids, values: Any, /) -> None: ...


class RowCalls(Calls):
    """Calls for rows of a frame: rows [calls] is the row that waits for each."""

    __slots__ = ("frame", "rows")

    def __init__(self, role: Role, frame: RowFrame[Any], rows: Ids) -> None:
        super().__init__(role, len(rows))
        self.frame, self.rows = frame, rows


class Widenings(RowCalls):
    """Requests for wider slices. owners: by call the object that the row belongs to."""

    __slots__ = ("owners",)

    def __init__(self, role: Role, frame: RowFrame[Any], rows: Ids, owners: Sequence[Any]) -> None:
        super().__init__(role, frame, rows)
        self.owners = owners


class Lookups(RowCalls):
    """Lookups of `counts` [calls] ids each, whose logits are stored at `places`, call after call."""

    __slots__ = ("_counts", "_ends", "_places", "_sink")

    def __init__(self, role: Role, frame: RowFrame[Any], rows: Ids, counts: Ids, places: Ids, sink: Sink) -> None:
        super().__init__(role, frame, rows)
        self._counts, self._ends = counts, np.cumsum(counts)
        self._places, self._sink = places, sink

    def take(self, values: NDArray[Any], first: int, end: int) -> None:
        """Store the values of the calls from `first` to before `end`. Raises ProtocolError if their number is wrong."""
        part, calls = slice(int(self._ends[first] - self._counts[first]), int(self._ends[end - 1])), slice(first, end)
        if len(values) != part.stop - part.start:
            raise ProtocolError(f"the {self.role} model sent another number of logits than was requested")
        self._sink(self.rows[calls], self._counts[calls], self._places[part], values)
        self.frame.take_answers(self.role, self.rows[calls])


class InflightCalls:
    """The calls in flight. Ids rise with every call."""

    def __init__(self) -> None:
        self._next = 1
        self._firsts: list[int] = []  # first ids of the batches, ascending
        self._batches: dict[int, Calls] = {}  # by first id

    def unawaited_id(self) -> int:
        """An id for a call whose reply is not awaited."""
        self._next += 1
        return self._next - 1

    def extend(self, calls: ExtendCalls[Any]) -> int:
        """Register extends, each in place of one that its window awaited. Returns the id of the first."""
        for number, window in enumerate(calls.windows):
            self.forget_extend(window, calls.role)
            window.awaited[calls.role] = calls, number
        return self._issue(calls)

    def ask(self, calls: RowCalls) -> int:
        """Register calls for rows. Returns the id of the first."""
        calls.frame.calls.append(calls)
        return self._issue(calls)

    def _issue(self, calls: Calls) -> int:
        first = calls.first_id = self._next
        self._next += len(calls)
        self._firsts.append(first)
        self._batches[first] = calls
        return first

    def find(self, call_ids: NDArray[np.uint64]) -> Iterator[tuple[int, Calls, int, int]]:
        """Split ids into runs of one batch: index of the run in `call_ids`, the batch, and the numbers begin and end.

        The calls of a run are those from number `begin` to before `end`. Ids of forgotten calls are left out.
        """
        ids = call_ids.tolist()
        cuts = [0, *(at for at in range(1, len(ids)) if ids[at] != ids[at - 1] + 1), len(ids)]
        for begin, stop in pairwise(cuts):
            while begin < stop:
                wanted = ids[begin]
                at = bisect.bisect_right(self._firsts, wanted)
                calls = self._batches[self._firsts[at - 1]] if at else None
                if calls is not None and wanted < calls.first_id + len(calls):
                    number = wanted - calls.first_id
                    end = min(number + stop - begin, len(calls))
                    yield begin, calls, number, end
                    begin += end - number
                else:  # go on with the ids of the next batch, if there is one
                    begin = min(stop, begin + self._firsts[at] - wanted) if at < len(self._firsts) else stop

    def end(self, calls: Calls, numbers: slice | int) -> None:
        """Remove calls that were answered or refused, or that nobody waits for any more."""
        calls.alive[numbers] = False
        if not calls.alive.any() and self._batches.pop(calls.first_id, None) is not None:
            del self._firsts[bisect.bisect_left(self._firsts, calls.first_id)]
            if isinstance(calls, RowCalls):
                calls.frame.calls.remove(calls)

    def forget_extend(self, window: Caller, role: Role) -> None:
        """Forget the extend of a role that a window awaits. Its reply will be ignored."""
        if call := window.awaited.get(role):
            self.end(*call)

    def forget_rows(self, frame: RowFrame[Any], at: int, widenings_to: Role | None = None) -> None:
        """Forget the lookups of a row; and its widenings, of one role or of all. Their replies will be ignored."""
        for calls in [each for each in frame.calls if isinstance(each, RowCalls)]:
            if widenings_to is None or calls.role == widenings_to or isinstance(calls, Lookups):
                for number in np.flatnonzero(calls.alive & (calls.rows == at)).tolist():
                    self.end(calls, number)
