"""Calls to model replicas that are in flight, and the reading of their replies."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from actors.api.generation import Role
from actors.coordinator.replica_pool import Replica
from actors.coordinator.session import ActiveSession, LogitsRow, VerificationWindow
from actors.decoding.candidates import Ids, RowSlice
from actors.decoding.cross_vocab.translators import Alignment
from actors.decoding.vocabulary import RequiredLogits, VocabularyMap
from actors.wire.columns import rows_ids
from actors.wire.messages import WHOLE, Refusal, Refused, Rows, Values


@dataclass(slots=True, eq=False)
class InflightCall:
    """An item that was sent to a replica and is not answered yet."""

    kind: Literal["extend", "lookup", "widen"]
    window: VerificationWindow
    role: Role
    required: RequiredLogits | None = None  # of an extend
    row: LogitsRow | None = None  # of a lookup or widening
    before: RowSlice | None = None  # of a widening: the narrower slice
    lookups: Lookups | None = None  # the lookups that were sent together with this one
    start: int = 0  # of an extend: the position of its first row
    temperature: float = 1.0  # of an extend: of the tempered logsumexp
    call_id: int = 0


@dataclass(frozen=True, slots=True)
class Fault:
    """A refusal of a session's item by a replica."""

    active: ActiveSession
    role: Role
    code: Refusal
    detail: int

    def pause(self) -> float:
        """Seconds to wait before the item is sent again, with jitter. The first cache misses are repaired at once."""
        misses = self.active.misses
        pauses: dict[Refusal, float] = {
            Refusal.FULL: self.detail / 1000,
            Refusal.FAILED: min(2.0, 0.05 * 2.0**self.active.faults),
            Refusal.KV_MISS: min(1.0, 0.01 * 2.0 ** min(misses, 10)) if misses > 2 else 0.0,
        }
        return pauses.get(self.code, 0.0) * random.uniform(0.5, 1.0)


class InflightCalls:
    """The calls in flight, by id. touched: called with a row when one of its lookups is answered."""

    def __init__(self, touched: Callable[[LogitsRow], None]) -> None:
        self._touched = touched
        self._ids = itertools.count(1)
        self._calls: dict[int, InflightCall] = {}

    def get(self, call_id: int) -> InflightCall | None:
        """The call of an id; None if it was forgotten."""
        return self._calls.get(call_id)

    def unawaited_id(self) -> int:
        """An id for a call whose reply is not awaited."""
        return next(self._ids)

    def issue(self, call: InflightCall) -> int:
        """Register a call, and return its id."""
        call_id = call.call_id = next(self._ids)
        self._calls[call_id] = call
        call.window.active.call_ids.setdefault(call.role, set()).add(call_id)
        return call_id

    def complete(self, call: InflightCall) -> None:
        """Remove a call that was answered."""
        del self._calls[call.call_id]
        call.window.active.call_ids[call.role].discard(call.call_id)
        if call.kind == "lookup":
            assert call.row is not None
            call.row.lookup_answered()
            self._touched(call.row)

    def forget(self, active: ActiveSession, role: Role, lookups_only: bool = False) -> None:
        """Forget a session's calls to a role. Their replies will be ignored."""
        call_ids = active.call_ids.get(role, set())
        for call_id in list(call_ids):
            if not lookups_only or self._calls[call_id].kind == "lookup":
                del self._calls[call_id]
                call_ids.discard(call_id)

    def take_values(self, message: Values) -> None:
        """Store the replies to lookups."""
        call_ids, counts = message.items["call_id"].tolist(), message.items["values"].tolist()
        call = self.get(call_ids[0]) if call_ids else None
        if call is not None and call.lookups is not None and call.lookups.call_ids == call_ids:
            call.lookups.take(message.values)
            for call_id in call_ids:
                if (call := self.get(call_id)) is not None:
                    self.complete(call)
            return
        begin = 0
        for call_id, count in zip(call_ids, counts, strict=True):
            if (call := self.get(call_id)) is not None and call.lookups is not None:
                call.lookups.take(message.values[begin : begin + count], call_id)
                self.complete(call)
            begin += count

    def take_refusals(self, message: Refused) -> list[Fault]:
        """Remove refused calls. Returns one fault for each session and role."""
        faults: dict[tuple[int, Role], Fault] = {}
        for call_id, code, detail in message.items.tolist():
            if (call := self.get(call_id)) is not None:
                self.complete(call)
                # The refusal of an extend is the cause of those of the lookups that waited for it.
                active = call.window.active
                if call.kind == "extend" or (active.key, call.role) not in faults:
                    faults[active.key, call.role] = Fault(active, call.role, Refusal(code), detail)
        return list(faults.values())


Sink = Callable[[Ids, Ids, NDArray[Any]], None]  # stores values at (at, places)


class Lookups:
    """Lookups in several rows that are sent to one role together, and where their logits are stored.

    at [n]: index in `rows` of each id, ascending. places [n]: where `sink` stores its logit. positions: by row, of its
    token in the role's stream; None: that of the row itself.
    """

    def __init__(
        self,
        role: Role,
        rows: Sequence[LogitsRow],
        at: Ids,
        places: Ids,
        sink: Sink,
        positions: Sequence[int] | None = None,
    ) -> None:
        self.role, self.rows, self.at, self.places, self._sink = role, rows, at, places, sink
        self._positions = positions
        self.call_ids: list[int] = []  # consecutive, one for each row with ids
        self._counts = np.bincount(at, minlength=len(rows)).tolist()

    def sort(self, ids: Ids) -> Ids:
        """Sort the ids within each row, ascending."""
        order = np.argsort((self.at << 32) + ids, kind="stable")
        self.places = self.places[order]
        return ids[order]

    def by_replica(self, ids: Ids) -> Iterator[tuple[Replica, Lookups, Ids]]:
        """Split by replica: each replica, its lookups and their ids."""
        replicas = [row.window.active.replicas[self.role] for row in self.rows]
        if all(replica is replicas[0] for replica in replicas):
            yield replicas[0], self, ids
            return
        for replica in dict.fromkeys(replicas):
            selected = np.array([each is replica for each in replicas])[self.at]
            if selected.any():
                at, places = self.at[selected], self.places[selected]
                yield replica, Lookups(self.role, self.rows, at, places, self._sink, self._positions), ids[selected]

    def counted(self) -> Iterator[tuple[LogitsRow, tuple[int, int], int]]:
        """Rows with ids: each row, its key at the role's replica, and its number of ids."""
        for number, (row, count) in enumerate(zip(self.rows, self._counts, strict=True)):
            if count:
                position = row.position(self.role) if self._positions is None else self._positions[number]
                yield row, row.window.key(self.role, position), count

    def take(self, values: NDArray[Any], call_id: int | None = None) -> None:
        """Store the values of one call, or of all."""
        part = slice(None) if call_id is None else self._part(call_id)
        self._sink(self.at[part], self.places[part], values)

    def _part(self, call_id: int) -> slice:
        counts = [count for count in self._counts if count]
        number = call_id - self.call_ids[0]
        begin = sum(counts[:number])
        return slice(begin, begin + counts[number])


MapOf = Callable[[ActiveSession, Role], VocabularyMap | Alignment]


def read_rows(
    message: Rows, calls: Sequence[InflightCall | None], width: int, map_of: MapOf
) -> Iterator[tuple[InflightCall | None, list[RowSlice]]]:
    """The call of each item of the message and its rows; None and no rows for a forgotten call.

    width: logits in a whole row of this model.
    """
    ids = rows_ids(message, width)
    sums = message.logsumexp.tolist()
    ours, reader = dict[tuple[int, bool], NDArray[Any]](), _ColumnCursor(message)
    for call, (_, rows, k, required_ids) in zip(calls, message.items.tolist(), strict=True):
        at = reader.next(rows, max(k, 0), width if k == WHOLE else k, required_ids)
        if call is None:
            yield None, []
            continue
        mapping = map_of(call.window.active, call.role)
        key = (id(mapping), k == WHOLE)
        if key not in ours:
            own = np.arange(width) if k == WHOLE else ids
            ours[key] = own if isinstance(mapping, Alignment) else mapping.to_primary[own]
        theirs = ours[key]
        values = message.required[at.required].reshape(rows, required_ids)
        folded = call.required.fold(values) if call.required is not None else values
        tempered = message.tempered[at.rows : at.rows + rows].astype(np.float64)
        if call.required is not None:
            tempered = call.required.fold_sums(tempered, values, call.temperature)
        slices = []
        for row in range(rows):
            if k == WHOLE:
                mine, logits = theirs, message.logits[at.logits + row * width : at.logits + (row + 1) * width]
            else:
                mine = theirs[at.ids + row * k : at.ids + (row + 1) * k]
                logits = message.logits[at.logits + row * k : at.logits + (row + 1) * k]
            events, sum_ = folded[row], float(tempered[row])
            if call.before is not None:  # a wider slice has no more than the first of both
                events, sum_ = call.before.folded, call.before.tempered
            slices.append(RowSlice(mine, logits, events, sums[at.rows + row], sum_))
        yield call, slices


class _ItemColumns:
    """Offsets of an item in the flat columns."""

    __slots__ = ("ids", "logits", "required", "rows")

    def __init__(self, rows: int, ids: int, logits: int, required: slice) -> None:
        self.rows, self.ids, self.logits, self.required = rows, ids, logits, required


class _ColumnCursor:
    """Walks through the items of a message."""

    def __init__(self, message: Rows) -> None:
        self._rows = self._ids = self._logits = self._required = 0

    def next(self, rows: int, ids: int, logits: int, required: int) -> _ItemColumns:
        """Offsets of the next item: `rows` rows with so many ids, logits and required values each."""
        at = _ItemColumns(self._rows, self._ids, self._logits, slice(self._required, self._required + rows * required))
        self._rows += rows
        self._ids += rows * ids
        self._logits += rows * logits
        self._required += rows * required
        return at
