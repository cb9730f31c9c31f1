"""Who waits for a place, who gets the next one, and who is turned away. Plain: without sockets, its clock is given.

A session is admitted when each model that it needs now has room for its prompt and some growth; what has begun and
lost its cache, or found none, waits for the same room (it is parked) and comes before whoever has not begun. The
oldest session is never parked, so something always progresses.

Clients take turns: whoever waits is admitted round-robin over clients, each client's own in order of arrival. When
the queue is full, a newcomer displaces the youngest waiting session of the client that has most of them, if that client
still has no fewer than the newcomer's afterwards. Shares of the queue thus only become more equal, and one client alone
meets a plain bounded queue.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Sequence

from actors.api.generation import Generate, Rejected, Role
from actors.config import ServiceConfig
from actors.coordinator.cache_budget import CacheBudget, CacheSnapshot, need
from actors.coordinator.replica_pool import Replica
from actors.coordinator.request_checks import too_long
from actors.coordinator.session import ActiveSession, CacheWait
from actors.coordinator.states import SessionState

SHORTEST_S, LONGEST_S = 1.0, 60.0  # what a client is told to wait
_SMOOTHING = 0.1  # weight of the newest session in how long they take


class FairQueue:
    """Sessions by client: those of one client in order of arrival, the clients in turn."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, deque[ActiveSession]] = OrderedDict()  # the next one first

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def __iter__(self) -> Iterator[ActiveSession]:
        return (active for waiting in self._clients.values() for active in waiting)

    def push(self, active: ActiveSession) -> None:
        """Let a session wait."""
        self._clients.setdefault(active.client, deque()).append(active)

    def head(self) -> ActiveSession | None:
        """Whose turn it is."""
        return next(iter(self), None)

    def pop(self) -> ActiveSession:
        """Take the head; its client's next turn comes after everybody else's."""
        client, waiting = next(iter(self._clients.items()))
        active = waiting.popleft()
        self._clients.move_to_end(client)
        self._tidy(client)
        return active

    def remove(self, active: ActiveSession) -> None:
        """Forget a session; one that does not wait is ignored."""
        waiting = self._clients.get(active.client, deque())
        if active in waiting:
            waiting.remove(active)
            self._tidy(active.client)

    def displaced_by(self, client: str) -> ActiveSession | None:
        """Who makes way for a newcomer of this client; None if nobody waits more than one session more often."""
        most = max(self._clients.values(), key=len, default=deque[ActiveSession]())
        return most[-1] if len(most) >= len(self._clients.get(client, ())) + 2 else None

    def _tidy(self, client: str) -> None:
        if not self._clients[client]:
            del self._clients[client]


class WaitTimeEstimator:
    """How fast places come free, by Little's law: sessions that run, over the time that one takes."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began: dict[int, float] = {}  # by session
        self._takes_s: float | None = None

    def began(self, active: ActiveSession) -> None:
        """A session was admitted."""
        self._began[active.key] = self._clock()

    def ended(self, active: ActiveSession) -> None:
        """A session is over; one that never ran is ignored."""
        began = self._began.pop(active.key, None)
        if began is not None:
            took = self._clock() - began
            self._takes_s = took if self._takes_s is None else self._takes_s + _SMOOTHING * (took - self._takes_s)

    def wait_s(self, ahead: int) -> float:
        """Seconds in which about so many sessions end, between the shortest and the longest that is told."""
        now, running = self._clock(), len(self._began)
        takes_s = self._takes_s
        if takes_s is None:  # none has ended yet: they take at least as long as the oldest has
            takes_s = now - min(self._began.values(), default=now)
        return min(max(takes_s * ahead / max(1, running), SHORTEST_S), LONGEST_S)


class AdmissionQueue:
    """The sessions of one coordinator that have no place.

    active_sessions: those that have one. candidates: the replicas that a session of a role may go to; none if no
    replica of the role is connected.
    """

    def __init__(
        self,
        config: ServiceConfig,
        active_sessions: Callable[[], Collection[ActiveSession]],
        candidates: Callable[[Role], Sequence[Replica]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._active, self._candidates, self._clock = config, active_sessions, candidates, clock
        self._budget = CacheBudget(active_sessions)
        self._wait_time = WaitTimeEstimator(clock)
        self._queue = FairQueue()
        self._resumed: list[ActiveSession] = []  # moved here from another coordinator
        self._room_may_be_free = self._head_blocked = False
        self._next_pause_end = math.inf

    def __len__(self) -> int:
        return len(self._resumed) + len(self._queue)

    def __iter__(self) -> Iterator[ActiveSession]:
        yield from self._resumed
        yield from self._queue

    @property
    def parked(self) -> int:
        """Sessions that have begun and wait for room."""
        return sum(active.state == SessionState.PARKED for active in self._active())

    def refusal(self, request: Generate) -> Rejected | None:
        """Why one more session cannot wait; None if it can, or another makes way for it."""
        caches = {
            role: max((replica.welcome.cache_tokens for replica in self._candidates(role)), default=None)
            for role in request.prompts
        }
        if (refusal := too_long(request, caches, self._config.beyond_context)) is not None:
            return refusal
        if request.resumed or not self._full or self._queue.displaced_by(request.client) is not None:
            return None
        return self._overloaded()

    def _overloaded(self) -> Rejected:
        again = self._wait_time.wait_s(1 + len(self))
        return Rejected("overloaded", "too many requests are waiting; try again later", retry_after_s=again)

    def add(self, active: ActiveSession) -> None:
        """Let a session wait. If the queue is full, another is turned away for it."""
        self._room_may_be_free = True
        if active.resumed:
            self._resumed.append(active)
            self._resumed.sort(key=lambda each: each.age)
            return
        out = self._queue.displaced_by(active.client) if self._full else None
        if out is not None:
            self._queue.remove(out)
            out.events.emit(self._overloaded())
        self._queue.push(active)

    def remove(self, active: ActiveSession) -> None:
        """A session is over, whether it waited, ran or was parked."""
        self._queue.remove(active)
        if active in self._resumed:
            self._resumed.remove(active)
        self._wait_time.ended(active)
        self._room_may_be_free = True

    def park(self, active: ActiveSession, role: Role, pause_s: float, resume: Callable[[], None]) -> None:
        """A session lacks its cache at a model. `admit` calls `resume` after the pause, once there is room."""
        active.park(role, CacheWait(self._clock() + pause_s, resume))
        self._room_may_be_free = True

    def tick(self) -> None:
        """Half a second is over."""
        self._budget.note()
        self._room_may_be_free = True

    def admit(self, roles: Callable[[ActiveSession], Sequence[Role]]) -> Iterator[ActiveSession]:
        """Let go on who can: parked sessions, oldest first, then resumed ones, then new ones, clients in turn.

        roles: that a session needs now. Who begins is bound to a replica of each, but for roles that nobody plays.
        """
        if not (self._room_may_be_free or self._clock() >= self._next_pause_end):
            return
        self._room_may_be_free, self._next_pause_end = False, math.inf
        if not (len(self) or self.parked):
            return
        snapshot = self._budget.snapshot()
        self._unpark(snapshot)
        while (active := self._head()) is not None and len(self._active()) < self._config.coordinator.max_sessions:
            places = self._places(active, roles(active), snapshot)
            self._head_blocked = places is None
            if places is None:
                return
            if active.resumed:
                self._resumed.remove(active)
            else:
                self._queue.pop()
                active.age = time.time_ns()  # who is older evicts, and waiting earns nobody that
            for role, replica in places.items():
                active.bind(role, replica)
                snapshot.take(active, role, replica)
            self._wait_time.began(active)
            yield active
        self._head_blocked = False

    @property
    def _full(self) -> bool:
        config, taken = self._config.coordinator, len(self._active()) + len(self._resumed)
        places = 0 if self._head_blocked else max(0, config.max_sessions - taken)
        return len(self._queue) >= config.max_waiting + places

    def _head(self) -> ActiveSession | None:
        return self._resumed[0] if self._resumed else self._queue.head()

    def _places(
        self, active: ActiveSession, roles: Sequence[Role], snapshot: CacheSnapshot
    ) -> dict[Role, Replica] | None:
        """Where a session goes; None if some role has no room."""
        places = {}
        for role in roles:
            if candidates := self._candidates(role):
                replica = snapshot.choose(active, role, candidates)
                if replica is None:
                    return None
                places[role] = replica
        return places

    def _unpark(self, snapshot: CacheSnapshot) -> None:
        """Let parked sessions go on that find room, oldest first; where one waits, no younger one overtakes it."""
        now, oldest = self._clock(), min(self._active(), key=lambda active: active.age, default=None)
        waits = [(active, role, wait) for active in self._active() for role, wait in active.cache_waits.items()]
        for active, role, wait in sorted(waits, key=lambda each: each[0].age):
            replica = active.replicas[role]
            if now >= wait.not_before and (active is oldest or snapshot.fits(replica, need(active, role, replica))):
                active.unpark(role)
                snapshot.take(active, role, replica)
                wait.resume()
            else:
                snapshot.shut.add(replica)
                if wait.not_before > now:
                    self._next_pause_end = min(self._next_pause_end, wait.not_before)
