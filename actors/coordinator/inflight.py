"""Calls to model replicas that are not answered yet, and how their answers are read."""

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
    """An item on its way to a model."""

    kind: Literal["extend", "lookup", "widen"]
    window: VerificationWindow
    role: Role
    required: RequiredLogits | None = None  # of an extend
    row: LogitsRow | None = None  # of a lookup or widening
    before: RowSlice | None = None  # of a widening: the narrower slice
    lookups: Lookups | None = None  # the lookups that went out with this one
    start: int = 0  # of an extend: the position of its first row
    call_id: int = 0


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that a model refused."""

    active: ActiveSession
    role: Role
    code: Refusal
    detail: int

    def pause(self) -> float:
        """Seconds to wait before asking again, with jitter; a cache that is gone is filled at once, if not often."""
        misses = self.active.misses
        pauses: dict[Refusal, float] = {
            Refusal.FULL: self.detail / 1000,
            Refusal.FAILED: min(2.0, 0.05 * 2.0**self.active.faults),
            Refusal.KV_MISS: min(1.0, 0.01 * 2.0 ** min(misses, 10)) if misses > 2 else 0.0,
        }
        return pauses.get(self.code, 0.0) * random.uniform(0.5, 1.0)


class InflightCalls:
    """Everything that was asked and not answered. touched: notes a row of which a lookup is answered."""

    def __init__(self, touched: Callable[[LogitsRow], None]) -> None:
        self._touched = touched
        self._numbers = itertools.count(1)
        self._asked: dict[int, InflightCall] = {}

    def get(self, call_id: int) -> InflightCall | None:
        """What was asked with a ticket; None if nobody waits for it any more."""
        return self._asked.get(call_id)

    def number(self) -> int:
        """A ticket for an answer that nobody waits for."""
        return next(self._numbers)

    def issue(self, asked: InflightCall) -> int:
        """A ticket for something that is asked now."""
        call_id = asked.call_id = next(self._numbers)
        self._asked[call_id] = asked
        asked.window.active.call_ids.setdefault(asked.role, set()).add(call_id)
        return call_id

    def done(self, asked: InflightCall) -> None:
        """It is answered."""
        del self._asked[asked.call_id]
        asked.window.active.call_ids[asked.role].discard(asked.call_id)
        if asked.kind == "lookup":
            assert asked.row is not None
            asked.row.lookup_answered()
            self._touched(asked.row)

    def forget(self, active: ActiveSession, role: Role, lookups_only: bool = False) -> None:
        """Nobody waits any more for what a role was asked about a session."""
        call_ids = active.call_ids.get(role, set())
        for call_id in list(call_ids):
            if not lookups_only or self._asked[call_id].kind == "lookup":
                del self._asked[call_id]
                call_ids.discard(call_id)

    def valued(self, message: Values) -> None:
        """Take in answers to lookups."""
        call_ids, counts = message.items["call_id"].tolist(), message.items["values"].tolist()
        asked = self.get(call_ids[0]) if call_ids else None
        if asked is not None and asked.lookups is not None and asked.lookups.call_ids == call_ids:
            asked.lookups.take(message.values)
            for call_id in call_ids:
                if (one := self.get(call_id)) is not None:
                    self.done(one)
            return
        begin = 0
        for call_id, count in zip(call_ids, counts, strict=True):
            if (one := self.get(call_id)) is not None and one.lookups is not None:
                one.lookups.take(message.values[begin : begin + count], call_id)
                self.done(one)
            begin += count

    def refused(self, message: Refused) -> list[Fault]:
        """Take in refusals: one fault for each session and role."""
        faults: dict[tuple[int, Role], Fault] = {}
        for call_id, code, detail in message.items.tolist():
            if (asked := self.get(call_id)) is not None:
                self.done(asked)
                # An extend's refusal says more than those of the lookups that waited for it.
                active = asked.window.active
                if asked.kind == "extend" or (active.key, asked.role) not in faults:
                    faults[active.key, asked.role] = Fault(active, asked.role, Refusal(code), detail)
        return list(faults.values())


Sink = Callable[[Ids, Ids, NDArray[Any]], None]  # where (at, places) the values belong


class Lookups:
    """Lookups about several rows that went to one role together, and where their answers belong.

    at [n]: which of `rows` each id belongs to, ascending. places [n]: where its logit goes, in terms of `sink`.
    positions: of the rows' tokens in the role's streams, where it is not the rows' own.
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
        self.call_ids: list[int] = []  # consecutive, one for each row of which something is asked
        self._counts = np.bincount(at, minlength=len(rows)).tolist()

    def sort(self, ids: Ids) -> Ids:
        """Bring each row's ids into ascending order."""
        order = np.argsort((self.at << 32) + ids, kind="stable")
        self.places = self.places[order]
        return ids[order]

    def by_replica(self, ids: Ids) -> Iterator[tuple[Replica, Lookups, Ids]]:
        """The same, each part with the replica that it goes to, and its ids."""
        replicas = [row.window.active.replicas[self.role] for row in self.rows]
        if all(replica is replicas[0] for replica in replicas):
            yield replicas[0], self, ids
            return
        for replica in dict.fromkeys(replicas):
            mine = np.array([each is replica for each in replicas])[self.at]
            if mine.any():
                part = Lookups(self.role, self.rows, self.at[mine], self.places[mine], self._sink, self._positions)
                yield replica, part, ids[mine]

    def counted(self) -> Iterator[tuple[LogitsRow, tuple[int, int], int]]:
        """Rows of which something is asked, what names them to the role's replica, and how many ids."""
        for number, (row, count) in enumerate(zip(self.rows, self._counts, strict=True)):
            if count:
                position = row.position(self.role) if self._positions is None else self._positions[number]
                yield row, row.window.name(self.role, position), count

    def take(self, values: NDArray[Any], call_id: int | None = None) -> None:
        """The answer to one ticket, or to all."""
        part = slice(None) if call_id is None else self._part(call_id)
        self._sink(self.at[part], self.places[part], values)

    def _part(self, call_id: int) -> slice:
        counts = [count for count in self._counts if count]
        number = call_id - self.call_ids[0]
        begin = sum(counts[:number])
        return slice(begin, begin + counts[number])


MapOf = Callable[[ActiveSession, Role], VocabularyMap | Alignment]


def read_rows(
    message: Rows, asked: Sequence[InflightCall | None], width: int, map_of: MapOf
) -> Iterator[tuple[InflightCall | None, list[RowSlice]]]:
    """Per item of the message what was asked (None: nobody waits for it any more) and its rows.

    width: logits in a whole row of this model.
    """
    ids = rows_ids(message, width)
    sums, ours, reader = message.logsumexp.tolist(), dict[tuple[int, bool], NDArray[Any]](), _ColumnCursor(message)
    for one, (_, rows, k, required_ids) in zip(asked, message.items.tolist(), strict=True):
        at = reader.next(rows, max(k, 0), width if k == WHOLE else k, required_ids)
        if one is None:
            yield None, []
            continue
        mapping = map_of(one.window.active, one.role)
        key = (id(mapping), k == WHOLE)
        if key not in ours:
            own = np.arange(width) if k == WHOLE else ids
            ours[key] = own if isinstance(mapping, Alignment) else mapping.to_primary[own]
        theirs = ours[key]
        values = message.required[at.required].reshape(rows, required_ids)
        folded = one.required.fold(values) if one.required is not None else values
        slices = []
        for row in range(rows):
            if k == WHOLE:
                mine, logits = theirs, message.logits[at.logits + row * width : at.logits + (row + 1) * width]
            else:
                mine = theirs[at.ids + row * k : at.ids + (row + 1) * k]
                logits = message.logits[at.logits + row * k : at.logits + (row + 1) * k]
            events = folded[row] if one.before is None else one.before.folded
            slices.append(RowSlice(mine, logits, events, sums[at.rows + row]))
        yield one, slices


class _ItemColumns:
    """Where an item's parts begin in the flat columns."""

    __slots__ = ("ids", "logits", "required", "rows")

    def __init__(self, rows: int, ids: int, logits: int, required: slice) -> None:
        self.rows, self.ids, self.logits, self.required = rows, ids, logits, required


class _ColumnCursor:
    """Walks through the items of a message."""

    def __init__(self, message: Rows) -> None:
        self._rows = self._ids = self._logits = self._required = 0

    def next(self, rows: int, ids: int, logits: int, required: int) -> _ItemColumns:
        """The next item: `rows` rows of so many ids, logits and known values each."""
        at = _ItemColumns(self._rows, self._ids, self._logits, slice(self._required, self._required + rows * required))
        self._rows += rows
        self._ids += rows * ids
        self._logits += rows * logits
        self._required += rows * required
        return at
