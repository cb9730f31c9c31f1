"""What was asked of models and not answered yet, found again by its ticket."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from actors.decoding.candidates import Block, Ids, Slice
from actors.decoding.vocabulary import Known
from actors.links import Replica
from actors.live import Live
from actors.requests import Role
from actors.window import Early, Row, Window
from actors.wire.messages import Refusal


@dataclass(slots=True, eq=False)
class Asked:
    """An item on its way to a model."""

    kind: Literal["extend", "lookup", "widen"]
    window: Window
    role: Role
    known: Known | None = None  # of an extend
    row: Row | None = None  # of a lookup or widening
    before: Slice | None = None  # of a widening: the narrower slice
    lookups: Lookups | None = None  # the lookups that went out with this one
    ticket: int = 0


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that a model refused."""

    live: Live
    role: Role
    code: Refusal
    detail: int

    def pause(self) -> float:
        """Seconds to wait before asking again, with jitter; a cache that is gone is filled at once, if not often."""
        misses = self.live.misses
        pauses: dict[Refusal, float] = {
            Refusal.FULL: self.detail / 1000,
            Refusal.FAILED: min(2.0, 0.05 * 2.0**self.live.faults),
            Refusal.KV_MISS: min(1.0, 0.01 * 2.0 ** min(misses, 10)) if misses > 2 else 0.0,
        }
        return pauses.get(self.code, 0.0) * random.uniform(0.5, 1.0)


class Lookups:
    """Lookups about several rows that went to one role together, and where their answers belong.

    at [n]: which of `rows` each id belongs to, ascending. places [n]: where its logit goes: among the candidates of the
    rows' block, or, before there is one, among the slots of the guider's slice.
    """

    def __init__(
        self,
        role: Role,
        rows: Sequence[Row],
        at: Ids,
        places: Ids,
        *,
        block: Block | None = None,
        early: Early | None = None,
    ) -> None:
        self.role, self.rows, self.at, self.places = role, rows, at, places
        self._block, self._early = block, early
        self.tickets: list[int] = []  # consecutive, one for each row of which something is asked
        self._counts = np.bincount(at, minlength=len(rows)).tolist()

    def sort(self, ids: Ids) -> Ids:
        """Bring each row's ids into ascending order."""
        order = np.lexsort((ids, self.at))
        self.places = self.places[order]
        return ids[order]

    def by_replica(self, ids: Ids) -> Iterator[tuple[Replica, Lookups, Ids]]:
        """The same, each part with the replica that it goes to, and its ids."""
        replicas = [row.window.live.replicas[self.role] for row in self.rows]
        if all(replica is replicas[0] for replica in replicas):
            yield replicas[0], self, ids
            return
        for replica in dict.fromkeys(replicas):
            mine = np.array([each is replica for each in replicas])[self.at]
            if mine.any():
                part = Lookups(
                    self.role, self.rows, self.at[mine], self.places[mine], block=self._block, early=self._early
                )
                yield replica, part, ids[mine]

    def counted(self) -> Iterator[tuple[Row, int]]:
        """Rows of which something is asked, and how many ids."""
        return ((row, count) for row, count in zip(self.rows, self._counts, strict=True) if count)

    def take(self, values: NDArray[Any], ticket: int | None = None) -> None:
        """The answer to one ticket, or to all."""
        part = slice(None) if ticket is None else self._part(ticket)
        at, places = self.at[part], self.places[part]
        if self._block is not None:
            self._block.fill(self.role, at, places, values)
            return
        assert self._early is not None
        self._early.values[at, places] = values
        for number in np.unique(at).tolist():
            row = self.rows[number]
            if row.block is not None and row.early is self._early:  # it was joined meanwhile
                mine = at == number
                row.block.early(row.at, places[mine], values[mine])

    def _part(self, ticket: int) -> slice:
        counts = [count for count in self._counts if count]
        number = ticket - self.tickets[0]
        begin = sum(counts[:number])
        return slice(begin, begin + counts[number])
