"""Admission queue: fair scheduling across clients, parking, back-pressure. Uses no sockets, and a clock that is passed.

A session is admitted when every model that it needs has cache room for its prompt and some growth. An admitted session
whose cache was evicted or refused is parked: it waits for the same room, ahead of all queued sessions. The oldest
session is never held back, so at least one session always progresses.

Sessions are admitted round-robin over clients. Those of one client are admitted by priority, the lowest number first,
and in order of arrival among equals. When the queue is full, a new session displaces the last one of the client with
most queued sessions, if that client then still has at least as many as the new session's client. So shares of the queue
only become more equal, and for a single client the queue is a plain bounded one.
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

SHORTEST_S, LONGEST_S = 1.0, 60.0  # bounds of Retry-After
_SMOOTHING = 0.1  # weight of the newest session in the moving average of durations


class FairQueue:
    """Queued sessions, served round-robin over clients and by priority and arrival for each client."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, deque[ActiveSession]] = OrderedDict()  # the client that is next comes first

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def __iter__(self) -> Iterator[ActiveSession]:
        return (active for waiting in self._clients.values() for active in waiting)

    def push(self, active: ActiveSession) -> None:
        """Put a session into its client's queue, behind those of its own priority."""
        waiting = self._clients.setdefault(active.client, deque())
        behind = next(
            (n for n, other in enumerate(reversed(waiting)) if other.priority <= active.priority), len(waiting)
        )
        waiting.insert(len(waiting) - behind, active)

    def head(self) -> ActiveSession | None:
        """The session that is admitted next; None if the queue is empty."""
        return next(iter(self), None)

    def pop(self) -> ActiveSession:
        """Remove and return the head. Its client becomes the last one."""
        client, waiting = next(iter(self._clients.items()))
        active = waiting.popleft()
        self._clients.move_to_end(client)
        self._drop_if_empty(client)
        return active

    def remove(self, active: ActiveSession) -> None:
        """Remove a session, if it is queued."""
        waiting = self._clients.get(active.client, deque())
        if active in waiting:
            waiting.remove(active)
            self._drop_if_empty(active.client)

    def displaced_by(self, client: str) -> ActiveSession | None:
        """Session that makes way for one of this client; None if no client has at least two more queued sessions."""
        most = max(self._clients.values(), key=len, default=deque[ActiveSession]())
        return most[-1] if len(most) >= len(self._clients.get(client, ())) + 2 else None

    def _drop_if_empty(self, client: str) -> None:
        if not self._clients[client]:
            del self._clients[client]


class WaitTimeEstimator:
    """Estimates how soon sessions end, by Little's law: running sessions over the mean duration of one."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began: dict[int, float] = {}  # by session key
        self._duration_s: float | None = None

    def began(self, active: ActiveSession) -> None:
        """Record that a session was admitted."""
        self._began[active.key] = self._clock()

    def ended(self, active: ActiveSession) -> None:
        """Record that a session ended; ignored if it was never admitted."""
        began = self._began.pop(active.key, None)
        if began is not None:
            lasted, mean = self._clock() - began, self._duration_s
            self._duration_s = lasted if mean is None else mean + _SMOOTHING * (lasted - mean)

    def wait_s(self, ahead: int) -> float:
        """Seconds until about `ahead` sessions have ended, between SHORTEST_S and LONGEST_S."""
        now, running = self._clock(), len(self._began)
        duration_s = self._duration_s
        if duration_s is None:  # none has ended yet: they take at least as long as the oldest one so far
            duration_s = now - min(self._began.values(), default=now)
        return min(max(duration_s * ahead / max(1, running), SHORTEST_S), LONGEST_S)


class AdmissionQueue:
    """Queued and resumed sessions of one coordinator. It also decides when parked sessions go on.

    active_sessions: returns the admitted sessions. usable_replicas: returns the replicas that may serve a role; none if
    no replica of the role is connected.
    """

    def __init__(
        self,
        config: ServiceConfig,
        active_sessions: Callable[[], Collection[ActiveSession]],
        usable_replicas: Callable[[Role], Sequence[Replica]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._active, self._usable_replicas, self._clock = config, active_sessions, usable_replicas, clock
        self._budget = CacheBudget(active_sessions)
        self._wait_time = WaitTimeEstimator(clock)
        self._queue = FairQueue()
        self._resumed: list[ActiveSession] = []  # from another coordinator, oldest first
        self._room_may_be_free = self._head_blocked = False
        self._next_pause_end = math.inf

    def __len__(self) -> int:
        return len(self._resumed) + len(self._queue)

    def __iter__(self) -> Iterator[ActiveSession]:
        yield from self._resumed
        yield from self._queue

    @property
    def parked(self) -> int:
        """Number of admitted sessions that wait for room in a cache."""
        return sum(active.state == SessionState.PARKED for active in self._active())

    def rejection(self, request: Generate) -> Rejected | None:
        """Return the reason to reject a request; None if it can be queued, or if another session makes way for it."""
        caches = {
            role: max((replica.welcome.cache_tokens for replica in self._usable_replicas(role)), default=None)
            for role in request.prompts
        }
        if (rejection := too_long(request, caches, self._config.beyond_context)) is not None:
            return rejection
        if request.resumed or not self._full or self._queue.displaced_by(request.client) is not None:
            return None
        return self._overloaded()

    def _overloaded(self) -> Rejected:
        wait_s = self._wait_time.wait_s(1 + len(self))
        return Rejected("overloaded", "too many requests are waiting; try again later", retry_after_s=wait_s)

    def add(self, active: ActiveSession) -> None:
        """Queue a session. If the queue is full, another session is rejected for it."""
        self._room_may_be_free = True
        if active.resumed:
            self._resumed.append(active)
            self._resumed.sort(key=lambda each: each.age)
            return
        displaced = self._queue.displaced_by(active.client) if self._full else None
        if displaced is not None:
            self._queue.remove(displaced)
            displaced.events.emit(self._overloaded())
        self._queue.push(active)

    def remove(self, active: ActiveSession) -> None:
        """Forget a session that has ended, in whatever state it was."""
        self._queue.remove(active)
        if active in self._resumed:
            self._resumed.remove(active)
        self._wait_time.ended(active)
        self._room_may_be_free = True

    def park(self, active: ActiveSession, role: Role, pause_s: float, resume: Callable[[], None]) -> None:
        """Park a session without cache room for a role. `admit` calls `resume` after the pause, once there is room."""
        active.park(role, CacheWait(self._clock() + pause_s, resume))
        self._room_may_be_free = True

    def tick(self) -> None:
        """Look at the caches again. Call every half second."""
        self._budget.record()
        self._room_may_be_free = True

    def admit(self, roles: Callable[[ActiveSession], Sequence[Role]]) -> Iterator[ActiveSession]:
        """Resume parked sessions, oldest first; then yield resumed and queued sessions that can be admitted.

        roles: returns the roles that a session needs. An admitted session is bound to a replica of each role that has
        one.
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
                active.age = time.time_ns()  # older sessions evict younger ones; time in the queue gives no such right
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
        """A replica with room for each role; None if a role has replicas, but none with room."""
        places = {}
        for role in roles:
            if replicas := self._usable_replicas(role):
                replica = snapshot.choose(active, role, replicas)
                if replica is None:
                    return None
                places[role] = replica
        return places

    def _unpark(self, snapshot: CacheSnapshot) -> None:
        """Resume parked sessions that fit, oldest first. Where one still waits, no younger session is let in."""
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
