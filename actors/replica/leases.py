"""Leases: the coordinator that owns each session at a model (by epoch), and each session's queue of requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from actors.replica.scheduler import ScheduledExtend
from actors.wire.columns import ExtendItem, RowRequest
from actors.wire.messages import Refusal
from actors.wire.replies import Recipient, Replies


class Waiter(NamedTuple):
    """A lookup (of `ids`) or a widening (`ids` is None) whose row is still being computed."""

    peer: Recipient
    item: RowRequest
    ids: NDArray[np.int32] | None
    since: float  # time.monotonic()


@dataclass(slots=True, eq=False)
class Lease:
    """A session at its model: its owner and its queue."""

    peer: Recipient  # the connection of the coordinator that owns it
    epoch: int
    call_id: int  # of the last extend; later extends have higher ones
    queue: deque[ScheduledExtend] = field(default_factory=deque)  # in order of arrival; the first may be running
    waiters: list[Waiter] = field(default_factory=list)

    def makes(self, position: int) -> bool:
        """True if a queued extend computes the row of the token at `position`."""
        return any(scheduled.makes(position) for scheduled in self.queue)

    def refuse(self, replies: Replies, code: Refusal, detail: int = 0) -> None:
        """Refuse everything that waits or runs. The result of an extend that runs is discarded."""
        for scheduled in self.queue:
            replies.refuse(scheduled.peer, scheduled.item.call_id, code, detail)
        for waiter in self.waiters:
            replies.refuse(waiter.peer, waiter.item.call_id, code, detail)
        self.queue.clear()
        self.waiters.clear()


class SessionLeases:
    """The leases of all sessions of a model, by the session's key."""

    def __init__(self) -> None:
        self._sessions: dict[int, Lease] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, session: int) -> Lease | None:
        return self._sessions.get(session)

    @property
    def waiting(self) -> int:
        """Number of extends that wait or run."""
        return sum(len(lease.queue) for lease in self._sessions.values())

    @property
    def idle(self) -> bool:
        """True if no extend waits or runs."""
        return not any(lease.queue for lease in self._sessions.values())

    def waiters(self) -> Iterator[Lease]:
        """The sessions that have waiting lookups or widenings."""
        return (lease for lease in self._sessions.values() if lease.waiters)

    def heads(self) -> list[ScheduledExtend]:
        """The first queued extend of each session that has one."""
        return [lease.queue[0] for lease in self._sessions.values() if lease.queue]

    def running(self, scheduled: ScheduledExtend) -> Lease | None:
        """The lease of an extend whose forward is over; None if it was refused meanwhile."""
        lease = self._sessions.get(scheduled.item.session)
        return lease if lease is not None and lease.queue and lease.queue[0] is scheduled else None

    def claim(self, peer: Recipient, item: ExtendItem, replies: Replies) -> Lease | None:
        """The lease for the sender of `item`; None if the item was refused or is a late duplicate.

        A lower epoch is refused. A higher epoch takes the session over. Another connection with the same epoch also
        does: it is the same owner after a reconnect.
        """
        lease = self._sessions.get(item.session)
        if lease is None:
            lease = self._sessions[item.session] = Lease(peer, item.epoch, item.call_id)
            return lease
        if item.epoch < lease.epoch:
            replies.refuse(peer, item.call_id, Refusal.SUPERSEDED, lease.epoch)
            return None
        if item.epoch == lease.epoch and item.call_id <= lease.call_id:
            return None
        if item.epoch > lease.epoch or lease.peer is not peer:
            lease.refuse(replies, Refusal.SUPERSEDED, item.epoch)
            lease.peer, lease.epoch = peer, item.epoch
        lease.call_id = item.call_id
        return lease

    def release(self, peer: Recipient, session: int, replies: Replies) -> bool:
        """End a session that its owner has released. False if `peer` does not own it."""
        lease = self._sessions.get(session)
        if lease is None or lease.peer is not peer:
            return False
        lease.refuse(replies, Refusal.ROW_GONE)
        del self._sessions[session]
        return True

    def release_all(self, peer: Recipient, replies: Replies) -> list[int]:
        """End all sessions of a closed connection; their keys."""
        left = [session for session, lease in self._sessions.items() if lease.peer is peer]
        for session in left:
            self.release(peer, session, replies)
        return left

    def owns_any(self, peer: Recipient) -> bool:
        return any(lease.peer is peer for lease in self._sessions.values())
