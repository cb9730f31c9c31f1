"""Lookups and widenings at a model: answered from held rows at once, or as soon as their row is made.

All of it runs on the event loop's thread, so that a lookup never waits for the forward of other sessions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from actors.forward import Engine, SessionRows, width_of, within
from actors.ownership import Ledger, Owned, Waiter
from actors.wire.columns import Answer, Recipient, Replies, RowItem
from actors.wire.messages import WHOLE, Refusal


class RowDesk:
    """Answers every lookup and widening: its value, `ROW_GONE`, `FAILED`, `SUPERSEDED` or `BAD_ITEM`.

    wait_s: the longest that one waits for its row.
    """

    def __init__(self, engine: Engine, ledger: Ledger, replies: Replies, wait_s: float) -> None:
        self._engine, self._ledger, self._replies, self._wait_s = engine, ledger, replies, wait_s
        self.asked = 0
        self.waited = 0

    def ask(self, peer: Recipient, items: Iterable[RowItem], *, sound: bool = False) -> None:
        """Answer what can be answered now, and keep the rest until its row is there.

        sound: all ids of all items are known to lie within a row.
        """
        for item in items:
            self.asked += 1
            owned = self._ledger.get(item.session)
            if owned is not None and item.epoch < owned.epoch:
                self._replies.refuse(peer, item.ticket, Refusal.SUPERSEDED, owned.epoch)
            elif not sound and self._wrong(item):
                self._replies.refuse(peer, item.ticket, Refusal.BAD_ITEM)
            elif not self._serve(peer, item):
                self._wait(peer, item, owned)
        self._replies.flush()

    def _wrong(self, item: RowItem) -> bool:
        return item.k < WHOLE if item.ids is None else not within(item.ids, self._engine.width)

    def settle(self, owned: Owned, gone: Refusal) -> None:
        """An extend of this session is over: answer what waited for it, with `gone` if it left no such row."""
        waiters, owned.waiters = owned.waiters, []
        for waiter in waiters:
            if not self._serve(waiter.peer, waiter.item):
                if owned.makes(waiter.item.position):
                    owned.waiters.append(waiter)
                    continue
                self._replies.refuse(waiter.peer, waiter.item.ticket, gone)
            waiter.deadline.cancel()

    def _serve(self, peer: Recipient, item: RowItem) -> bool:
        """Answer from a row that is held; False if it is not."""
        held = self._engine.rows(item.session)
        row = held.index(item.position, item.row) if held is not None else None
        if held is None or row is None:
            return False
        if item.ids is None:
            self._widen(peer, item, held, row)
        else:
            self._replies.values(peer, item.ticket, held.at(row, item.ids))
        return True

    def _widen(self, peer: Recipient, item: RowItem, held: SessionRows, row: int) -> None:
        k = width_of(item.k, self._engine.width)
        slices = held.slices(max(k, 0), [row])
        logits = held.whole([row]) if k == WHOLE else slices.logits
        self._replies.rows(peer, item.ticket, Answer(k, slices.logsumexp, slices.ids, logits, logits[:, :0]))

    def _wait(self, peer: Recipient, item: RowItem, owned: Owned | None) -> None:
        if owned is None or item.epoch > owned.epoch or not owned.makes(item.position):
            self._replies.refuse(peer, item.ticket, Refusal.ROW_GONE)
            return
        self.waited += 1
        timer = asyncio.get_running_loop().call_later(self._wait_s, self._give_up, owned, item.ticket)
        owned.waiters.append(Waiter(peer, item, timer))

    def _give_up(self, owned: Owned, ticket: int) -> None:
        for waiter in [waiter for waiter in owned.waiters if waiter.item.ticket == ticket]:
            owned.waiters.remove(waiter)
            self._replies.refuse(waiter.peer, ticket, Refusal.ROW_GONE)
        self._replies.flush()
