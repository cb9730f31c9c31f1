"""Whose session is whose at a model: fencing by epoch, late duplicates, and the queue of each session."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from actors.replica.scheduler import Pending
from actors.wire.columns import ExtendItem, RowItem
from actors.wire.messages import Refusal
from actors.wire.replies import Recipient, Replies


class Waiter(NamedTuple):
    """A lookup (of `ids`) or widening (None) whose row is still being made."""

    peer: Recipient
    item: RowItem
    ids: NDArray[np.int32] | None
    since: float  # time.monotonic()


@dataclass(slots=True, eq=False)
class Owned:
    """A session as its model sees it."""

    peer: Recipient  # the connection of the coordinator that owns it
    epoch: int
    ticket: int  # of the last extend: no later one has a lower ticket
    queue: deque[Pending] = field(default_factory=deque)  # in the order of arrival; the first may be running
    running: Pending | None = None
    waiters: list[Waiter] = field(default_factory=list)

    def makes(self, position: int) -> bool:
        """Whether the row of the token at `position` is still being made."""
        return any(pending.makes(position) for pending in self.queue)

    def refuse(self, replies: Replies, code: Refusal, detail: int = 0) -> None:
        """Answer everything that waits with a refusal. What runs is no longer this owner's."""
        for pending in self.queue:
            replies.refuse(pending.peer, pending.item.ticket, code, detail)
        for waiter in self.waiters:
            replies.refuse(waiter.peer, waiter.item.ticket, code, detail)
        self.queue.clear()
        self.waiters.clear()
        self.running = None


class Ledger:
    """All sessions of a model, by key."""

    def __init__(self) -> None:
        self._sessions: dict[int, Owned] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, session: int) -> Owned | None:
        return self._sessions.get(session)

    @property
    def waiting(self) -> int:
        """Extends that wait or run."""
        return sum(len(owned.queue) for owned in self._sessions.values())

    @property
    def idle(self) -> bool:
        """Whether no extend waits or runs."""
        return not any(owned.queue for owned in self._sessions.values())

    def waiters(self) -> Iterator[Owned]:
        """Sessions for whose rows something waits."""
        return (owned for owned in self._sessions.values() if owned.waiters)

    def heads(self) -> Iterator[tuple[Owned, Pending]]:
        """The first extend of each session that has one."""
        return ((owned, owned.queue[0]) for owned in self._sessions.values() if owned.queue)

    def claim(self, peer: Recipient, item: ExtendItem, replies: Replies) -> Owned | None:
        """The session, owned by the sender of `item`; None if the item is refused or a late duplicate.

        A lower epoch is refused. A higher one takes over, and so does another connection of the same epoch: it is
        its owner, connected anew.
        """
        owned = self._sessions.get(item.session)
        if owned is None:
            owned = self._sessions[item.session] = Owned(peer, item.epoch, item.ticket)
            return owned
        if item.epoch < owned.epoch:
            replies.refuse(peer, item.ticket, Refusal.SUPERSEDED, owned.epoch)
            return None
        if item.epoch == owned.epoch and item.ticket <= owned.ticket:
            return None
        if item.epoch > owned.epoch or owned.peer is not peer:
            owned.refuse(replies, Refusal.SUPERSEDED, item.epoch)
            owned.peer, owned.epoch = peer, item.epoch
        owned.ticket = item.ticket
        return owned

    def release(self, peer: Recipient, session: int, replies: Replies) -> bool:
        """The owner is done with a session. False if `peer` does not own it."""
        owned = self._sessions.get(session)
        if owned is None or owned.peer is not peer:
            return False
        owned.refuse(replies, Refusal.ROW_GONE)
        del self._sessions[session]
        return True

    def release_all(self, peer: Recipient, replies: Replies) -> list[int]:
        """The sessions that a connection which closed has left behind."""
        left = [session for session, owned in self._sessions.items() if owned.peer is peer]
        for session in left:
            self.release(peer, session, replies)
        return left

    def owns_any(self, peer: Recipient) -> bool:
        return any(owned.peer is peer for owned in self._sessions.values())
