"""Lookups and widenings at a model: answered from held rows at once, or as soon as their row is computed.

A lookup never waits for a forward of other sessions. Rows in the host's memory are read on the event loop's thread, and
rows on a device on a thread that may wait for it. All lookups of one frame are read from the rows in one call, and so
are all lookups that one forward makes possible.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from actors.engine.interface import Engine, HeldRows
from actors.replica.answers import ids_in_range, width_of
from actors.replica.engine_thread import WorkerThread
from actors.replica.leases import Lease, SessionLeases, Waiter
from actors.wire.columns import RowRequest, lookup_items, widen_items
from actors.wire.link import cancel
from actors.wire.messages import ROWS_ITEM, VALUES_ITEM, WHOLE, Lookup, Refusal, Widen
from actors.wire.replies import AnsweredItems, Recipient, Reduced, Replies

log = logging.getLogger(__name__)

T = TypeVar("T")


class LookupService:
    """Answers every lookup and widening, with values or with `ROW_GONE`, `FAILED`, `SUPERSEDED` or `BAD_ITEM`.

    wait_s: the longest wait for a row to be computed, and then to be read, in seconds.
    reader: the thread that reads rows; None to read on the caller's, which may have to wait for a device.
    """

    def __init__(
        self,
        engine: Engine,
        leases: SessionLeases,
        replies: Replies,
        wait_s: float,
        reader: WorkerThread | None = None,
    ) -> None:
        self._engine, self._leases, self._replies, self._wait_s = engine, leases, replies, wait_s
        self._reader = reader
        self._reads: set[asyncio.Task[None]] = set()
        self._sweep: asyncio.TimerHandle | None = None  # set while something waits
        self.requested = 0
        self.waited = 0

    def close(self) -> None:
        """Answer no lookup any more."""
        cancel(self._sweep)
        for read in self._reads:
            read.cancel()

    def look_up(self, peer: Recipient, message: Lookup) -> None:
        """Answer the lookups whose rows are held; the others wait for theirs. Raises ProtocolError."""
        width = self._engine.width
        items, ids = lookup_items(message, width)
        valid = ids_in_range(ids, width)
        places, rows, end = [], [], 0
        for place, item in enumerate(items):
            begin, end = end, end + item.size
            lease = self._leases.get(item.session)
            if self._refused(peer, item, lease, invalid=not valid and not ids_in_range(ids[begin:end], width)):
                continue
            row = self._find(item)
            if row is not None:
                places.append(place)
                rows.append(row)
            else:
                self._wait(peer, item, lease, ids[begin:end])
        if rows:
            asked = message.items
            if len(places) < len(asked):
                held = np.zeros(len(asked), bool)
                held[places] = True
                asked, ids = asked[held], ids[np.repeat(held, asked["ids"])]
            table = np.empty(len(asked), VALUES_ITEM)
            table["call_id"], table["values"] = asked["call_id"], asked["ids"]
            self._read(
                partial(self._engine.values, rows, table["values"].tolist(), ids),
                partial(self._replies.values, peer, table),
                [(peer, call_id) for call_id in table["call_id"].tolist()],
            )
        self._finish(len(items))

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
        self._finish(len(items))

    def settle(self, concluded: Iterable[tuple[Lease, Refusal]]) -> None:
        """After a forward, answer what waits for rows of these sessions. All lookups are read in one call.

        If a row is neither held nor still being computed, its waiters get the refusal.
        """
        found: list[tuple[Waiter, NDArray[np.int32]]] = []
        rows = []
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
                    found.append((waiter, waiter.ids))
                    rows.append(row)
        if rows:
            counts, ids = [len(ids) for _, ids in found], np.concatenate([ids for _, ids in found])
            calls = [(waiter.peer, waiter.item.call_id) for waiter, _ in found]
            self._read(partial(self._engine.values, rows, counts, ids), partial(self._send, found), calls)

    def _send(self, found: Sequence[tuple[Waiter, NDArray[np.int32]]], values: NDArray[np.float32]) -> None:
        """Answer waiting lookups with their values, one after another."""
        end = 0
        for waiter, ids in found:
            begin, end = end, end + len(ids)
            item = np.array([(waiter.item.call_id, len(ids))], VALUES_ITEM)
            self._replies.values(waiter.peer, item, values[begin:end])

    def _read(self, work: Callable[[], T], send: Callable[[T], None], calls: Sequence[tuple[Recipient, int]]) -> None:
        """Send what `work` reads from held rows: at once, or when the reading thread has it. calls: to be answered."""
        if self._reader is None:
            send(work())
            return
        task = asyncio.get_running_loop().create_task(self._read_on_thread(self._reader, work, send, calls))
        self._reads.add(task)
        task.add_done_callback(self._reads.discard)

    async def _read_on_thread(
        self,
        reader: WorkerThread,
        work: Callable[[], T],
        send: Callable[[T], None],
        calls: Sequence[tuple[Recipient, int]],
    ) -> None:
        try:
            async with asyncio.timeout(self._wait_s):
                send(await reader.call(work))
        except Exception as error:
            why = repr(error)  # a log that keeps the error itself would keep the rows, by the frames of its traceback
            log.error("%d lookups are refused, their rows were not read in %s s: %s", len(calls), self._wait_s, why)
            for peer, call_id in calls:
                self._replies.refuse(peer, call_id, Refusal.ROW_GONE)
        self._replies.flush()

    def _finish(self, requested: int) -> None:
        self.requested += requested
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
        items = np.array([(item.call_id, 1, k, 0)], ROWS_ITEM)
        self._read(
            partial(_reduce, held, row, k),
            lambda reduced: self._replies.rows(peer, AnsweredItems(items, [reduced])),
            [(peer, item.call_id)],
        )

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


def _reduce(held: HeldRows, row: int, k: int) -> Reduced:
    """One row as slices of k, or whole."""
    slices = held.slices(max(k, 0), [row])
    logits = held.whole([row]) if k == WHOLE else slices.logits
    return Reduced(slices.logsumexp, slices.tempered, slices.ids, logits, logits[0, :0])
