"""Lookups and widenings at a model: answered from held rows at once, or as soon as their row is computed.

They run on the event loop's thread, so that a lookup never waits for a forward of other sessions. All lookups of one
frame are read from the rows in one call, and so are all lookups that one forward makes possible.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from actors.engine.interface import Engine, HeldRows
from actors.replica.answers import ids_in_range, width_of
from actors.replica.leases import Lease, SessionLeases, Waiter
from actors.wire.columns import RowRequest, lookup_items, widen_items
from actors.wire.link import cancel
from actors.wire.messages import WHOLE, Lookup, Refusal, Widen
from actors.wire.replies import Answer, Recipient, Reduced, Replies


class _OpenFrame:
    """Lookups whose rows are held, to be read in one call."""

    def __init__(self) -> None:
        self.peers: list[Recipient] = []
        self.items: list[tuple[int, int]] = []  # call_id, number of ids
        self.rows: list[tuple[HeldRows, int]] = []
        self.ids: list[NDArray[np.int32]] = []

    def add(self, peer: Recipient, item: RowRequest, row: tuple[HeldRows, int], ids: NDArray[np.int32]) -> None:
        self.peers.append(peer)
        self.items.append((item.call_id, item.size))
        self.rows.append(row)
        self.ids.append(ids)

    def answer(self, engine: Engine, replies: Replies) -> None:
        """Read all values in one call. Consecutive lookups of one peer are sent as one slice, without a copy."""
        if not self.items:
            return
        counts = [count for _, count in self.items]
        values = engine.values(self.rows, counts, self.ids[0] if len(self.ids) == 1 else np.concatenate(self.ids))
        first = begin = end = 0
        for place, count in enumerate(counts, 1):
            end += count
            if place == len(counts) or self.peers[place] is not self.peers[first]:
                replies.values(self.peers[first], self.items[first:place], values[begin:end])
                first, begin = place, end


class LookupService:
    """Answers every lookup and widening, with values or with `ROW_GONE`, `FAILED`, `SUPERSEDED` or `BAD_ITEM`.

    wait_s: the longest wait for a row, in seconds.
    """

    def __init__(self, engine: Engine, leases: SessionLeases, replies: Replies, wait_s: float) -> None:
        self._engine, self._leases, self._replies, self._wait_s = engine, leases, replies, wait_s
        self._sweep: asyncio.TimerHandle | None = None  # set while something waits
        self.requested = 0
        self.waited = 0

    def close(self) -> None:
        """Stop the timer of waiting lookups."""
        cancel(self._sweep)

    def look_up(self, peer: Recipient, message: Lookup) -> None:
        """Answer the lookups whose rows are held; the others wait for theirs. Raises ProtocolError."""
        width = self._engine.width
        items, ids = lookup_items(message, width)
        valid = ids_in_range(ids, width)
        frame, end = _OpenFrame(), 0
        for item in items:
            begin, end = end, end + item.size
            lease = self._leases.get(item.session)
            if self._refused(peer, item, lease, invalid=not valid and not ids_in_range(ids[begin:end], width)):
                continue
            row = self._find(item)
            if row is not None:
                frame.add(peer, item, row, ids[begin:end])
            else:
                self._wait(peer, item, lease, ids[begin:end])
        self._finish(frame, len(items))

    def widen(self, peer: Recipient, message: Widen) -> None:
        """Answer the widenings whose rows are held; the others wait for theirs."""
        items = widen_items(message)
        for item in items:
            lease = self._leases.get(item.session)
            if self._refused(peer, item, lease, invalid=item.size < WHOLE):
                continue
            row = self._find(item)
            if row is not None:
                self._widen(peer, item, *row)
            else:
                self._wait(peer, item, lease, None)
        self._finish(_OpenFrame(), len(items))

    def settle(self, concluded: Iterable[tuple[Lease, Refusal]]) -> None:
        """Answer what waits for rows of these sessions, after a forward.

        If a row is neither held nor still being computed, its waiters get the refusal.
        """
        frame = _OpenFrame()
        for lease, refusal in concluded:
            waiters, lease.waiters = lease.waiters, []
            for waiter in waiters:
                row = self._find(waiter.item)
                if row is None and lease.makes(waiter.item.position):
                    lease.waiters.append(waiter)
                elif row is None:
                    self._replies.refuse(waiter.peer, waiter.item.call_id, refusal)
                elif waiter.ids is None:
                    self._widen(waiter.peer, waiter.item, *row)
                else:
                    frame.add(waiter.peer, waiter.item, row, waiter.ids)
        frame.answer(self._engine, self._replies)

    def _finish(self, frame: _OpenFrame, requested: int) -> None:
        self.requested += requested
        frame.answer(self._engine, self._replies)
        self._replies.flush()

    def _refused(self, peer: Recipient, item: RowRequest, lease: Lease | None, *, invalid: bool) -> bool:
        """Refuse an item of a former owner or an invalid one. True if it was refused."""
        if lease is not None and item.epoch < lease.epoch:
            self._replies.refuse(peer, item.call_id, Refusal.SUPERSEDED, lease.epoch)
        elif invalid:
            self._replies.refuse(peer, item.call_id, Refusal.BAD_ITEM)
        else:
            return False
        return True

    def _find(self, item: RowRequest) -> tuple[HeldRows, int] | None:
        held = self._engine.rows(item.session)
        row = held.index(item.position, item.row) if held is not None else None
        return None if held is None or row is None else (held, row)

    def _widen(self, peer: Recipient, item: RowRequest, held: HeldRows, row: int) -> None:
        k = width_of(item.size, self._engine.width)
        slices = held.slices(max(k, 0), [row])
        logits = held.whole([row]) if k == WHOLE else slices.logits
        reduced = Reduced(k, slices.logsumexp, slices.tempered, slices.ids, logits, logits[0, :0])
        self._replies.rows(peer, item.call_id, [Answer(reduced, 0, 1, 0, 0)])

    def _wait(self, peer: Recipient, item: RowRequest, lease: Lease | None, ids: NDArray[np.int32] | None) -> None:
        if lease is None or item.epoch > lease.epoch or not lease.makes(item.position):
            self._replies.refuse(peer, item.call_id, Refusal.ROW_GONE)
            return
        self.waited += 1
        lease.waiters.append(Waiter(peer, item, ids, time.monotonic()))
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(self._wait_s, self._give_up)

    def _give_up(self) -> None:
        """Refuse waiters whose time is over, and set the timer for the next ones."""
        now, oldest = time.monotonic(), None
        for lease in self._leases.waiters():
            late = [waiter for waiter in lease.waiters if waiter.since + self._wait_s <= now]
            for waiter in late:
                self._replies.refuse(waiter.peer, waiter.item.call_id, Refusal.ROW_GONE)
            lease.waiters = lease.waiters[len(late) :]  # in order of arrival
            if lease.waiters and (oldest is None or lease.waiters[0].since < oldest):
                oldest = lease.waiters[0].since
        self._sweep = None
        if oldest is not None:
            self._sweep = asyncio.get_running_loop().call_later(oldest + self._wait_s - now, self._give_up)
        self._replies.flush()
