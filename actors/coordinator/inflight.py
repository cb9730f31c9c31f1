"""Calls to model replicas that are in flight, in batches of consecutive ids, and the lookups among them."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np

from actors.api.generation import Role
from actors.coordinator.frames import RowFrame
from actors.decoding.candidates import Ids

Kind = Literal["extend", "lookup", "widen"]


class Caller(Protocol):
    """A window, which lists its calls in flight: for each one its batch, and its number there."""

    calls: list[tuple[Any, int]]


W = TypeVar("W", bound=Caller)


class CallBatch(Generic[W]):
    """Items of one kind for one role, with consecutive ids. details: what the replies are read with, by number."""

    __slots__ = ("_left", "alive", "callers", "details", "first_id", "kind", "role")

    def __init__(self, kind: Kind, role: Role, callers: Sequence[W], details: Any) -> None:
        self.kind, self.role, self.callers, self.details = kind, role, callers, details
        self.first_id = 0
        self.alive = bytearray(b"\1" * len(callers))  # in flight and not forgotten
        self._left = len(callers)

    def __len__(self) -> int:
        return len(self.callers)

    def end(self, number: int) -> bool:
        """A call is answered, refused or forgotten. Returns True if none of the batch is in flight any more."""
        self._left -= self.alive[number]
        self.alive[number] = 0
        return not self._left


class InflightCalls(Generic[W]):
    """The calls in flight. Ids rise with every call."""

    def __init__(self) -> None:
        self._next = 1
        self._firsts: list[int] = []  # first ids of the batches, ascending
        self._batches: dict[int, CallBatch[W]] = {}  # by first id

    def unawaited_id(self) -> int:
        """An id for a call whose reply is not awaited."""
        self._next += 1
        return self._next - 1

    def issue(self, batch: CallBatch[W]) -> int:
        """Register the calls of a batch. Returns the id of the first."""
        first = batch.first_id = self._next
        self._next += len(batch)
        self._firsts.append(first)
        self._batches[first] = batch
        for number, caller in enumerate(batch.callers):
            caller.calls.append((batch, number))
        return first

    def find(self, call_ids: Sequence[int]) -> Iterator[tuple[int, int, CallBatch[W] | None, int]]:
        """Split ids into runs of one batch: begin and end in `call_ids`, the batch, and the number of the first call.

        The numbers of a run are consecutive. The batch is None for calls that are unknown.
        """
        begin = 0
        while begin < len(call_ids):
            at = bisect.bisect_right(self._firsts, call_ids[begin]) - 1
            batch = self._batches[self._firsts[at]] if at >= 0 else None
            number = call_ids[begin] - batch.first_id if batch is not None else 0
            if batch is None or number >= len(batch):
                yield begin, begin + 1, None, 0
                begin += 1
                continue
            end = begin + 1
            while end < len(call_ids) and call_ids[end] == call_ids[end - 1] + 1 and number + end - begin < len(batch):
                end += 1
            yield begin, end, batch, number
            begin = end

    def end(self, batch: CallBatch[W], number: int) -> None:
        """Remove a call that was answered or refused."""
        if batch.end(number) and self._batches.pop(batch.first_id, None) is not None:
            del self._firsts[bisect.bisect_left(self._firsts, batch.first_id)]

    def forget(self, caller: W, role: Role | None = None, lookups_only: bool = False) -> None:
        """Forget a window's calls to a role, or to every role. Their replies will be ignored."""
        kept = []
        for batch, number in caller.calls:
            if (role is None or batch.role == role) and (not lookups_only or batch.kind == "lookup"):
                self.end(batch, number)
            elif batch.alive[number]:
                kept.append((batch, number))
        caller.calls = kept


def owing(caller: Caller) -> set[Role]:
    """The roles that owe a window an answer."""
    return {batch.role for batch, number in caller.calls if batch.alive[number]}


class Sink(Protocol):
    """Stores the logits of a lookup at (rows, places)."""

    def __call__(self, rows: Ids, places: Ids, values: Any, /) -> None: ...


@dataclass(frozen=True, slots=True)
class Lookups:
    """Lookups that are sent to one replica together, and where their logits are stored.

    waiting [calls]: by call the row of `frame` that waits for it. rows, places [n]: of each id, call after call. ends:
    by call the number of ids up to its last.
    """

    frame: RowFrame[Any]
    waiting: Ids
    rows: Ids
    places: Ids
    ends: Sequence[int]
    sink: Sink

    def take(self, values: Any, first: int, end: int) -> None:
        """Store the values of the calls from `first` to before `end`."""
        part = slice(self.ends[first - 1] if first else 0, self.ends[end - 1])
        self.sink(self.rows[part], self.places[part], values)
        np.subtract.at(self.frame.lookups, self.waiting[first:end], 1)


def sort_within_rows(rows: Ids, places: Ids, ids: Ids) -> tuple[Ids, Ids]:
    """Places and ids, sorted by id within each row."""
    order = np.argsort((rows << 32) + ids, kind="stable")
    return places[order], ids[order]
