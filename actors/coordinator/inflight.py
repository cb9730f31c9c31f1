"""Calls to model replicas that are in flight, in batches of consecutive ids: extends of windows, and calls for rows."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from actors.api.generation import Role
from actors.coordinator.frames import RowFrame
from actors.decoding.candidates import Ids
from actors.wire.messages import ProtocolError


class Calls:
    """Items of one kind that were sent to one replica of a role, with consecutive ids."""

    __slots__ = ("alive", "first_id", "left", "role")

    def __init__(self, role: Role, count: int) -> None:
        self.role, self.first_id = role, 0
        self.alive = np.ones(count, np.bool_)  # in flight and not forgotten
        self.left = count  # of these

    def __len__(self) -> int:
        return len(self.alive)


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

    def of_row(self, at: int) -> list[int]:
        """The numbers of a row's calls in flight."""
        return np.flatnonzero(self.alive & (self.rows == at)).tolist()


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

    def take(self, values: NDArray[Any], counts: Ids, numbers: Ids, items: Ids) -> None:
        """Store the values of the calls `numbers` [n]: those of `items` [n] of a message, whose items have counts [m].

        Raises ProtocolError if a call is answered by another number of values than was requested.
        """
        if (counts[items] != self._counts[numbers]).any():
            raise ProtocolError(f"the {self.role} model sent another number of logits than was requested")
        places = self._places
        if len(numbers) < len(self):
            places = places[_parts(self._ends, self._counts, numbers)]
        if len(items) < len(counts) or (len(items) > 1 and (items[1:] < items[:-1]).any()):
            values = values[_parts(np.cumsum(counts), counts, items)]
        self._sink(self.rows[numbers], self._counts[numbers], places, values)
        self.frame.take_answers(self.role, self.rows[numbers])


def _parts(ends: Ids, counts: Ids, chosen: Ids) -> Ids:
    """The indices of the chosen parts of a flat column, part after part. ends, counts [n]: of each of its parts.

    Example: ends [2, 3, 6], counts [2, 1, 3], chosen [2, 0]: [3, 4, 5, 0, 1].
    """
    sizes = counts[chosen]
    within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    indices: Ids = np.repeat(ends[chosen] - sizes, sizes) + within
    return indices


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

    def find(self, call_ids: NDArray[np.uint64]) -> Iterator[tuple[Calls, Ids, Ids]]:
        """Split ids by batches: each batch, the numbers of the calls in it, ascending, and their indices in `call_ids`.

        Ids of forgotten calls are left out. Raises ProtocolError if an id occurs twice.
        """
        ids, items = call_ids.astype(np.int64), np.arange(len(call_ids))
        if len(ids) > 1 and not (ids[1:] > ids[:-1]).all():
            items = np.argsort(ids)
            ids = ids[items]
            if (ids[1:] == ids[:-1]).any():
                raise ProtocolError("a model answered a call twice in one message")
        begin = 0
        while begin < len(ids):
            at = bisect.bisect_right(self._firsts, ids.item(begin))
            calls = self._batches[self._firsts[at - 1]] if at else None
            end = int(np.searchsorted(ids, calls.first_id + len(calls))) if calls is not None else 0
            if calls is not None and end > begin:
                numbers, places = ids[begin:end] - calls.first_id, items[begin:end]
                if calls.left < len(calls):
                    alive = calls.alive[numbers]
                    numbers, places = numbers[alive], places[alive]
                begin = end
                if len(numbers):
                    yield calls, numbers, places
            else:  # go on with the ids of the next batch, if there is one
                begin = int(np.searchsorted(ids, self._firsts[at])) if at < len(self._firsts) else len(ids)

    def end(self, calls: Calls, numbers: Ids | int) -> None:
        """Remove calls in flight that were answered or refused, or that nobody waits for any more."""
        calls.left -= 1 if isinstance(numbers, int) else len(numbers)
        calls.alive[numbers] = False
        if not calls.left:
            del self._batches[calls.first_id]
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
                for number in calls.of_row(at):
                    self.end(calls, number)
