"""Free tokens in the replicas' KV caches, as one coordinator estimates them.

The coordinator knows its own sessions to the token. The share of other coordinators is the usage in a replica's last
heartbeat less what this coordinator held there at about that time, as a heartbeat may be some intervals old.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from actors.api.generation import Role
from actors.coordinator.replica_pool import Replica
from actors.coordinator.session import ActiveSession
from actors.engine.interface import BLOCK

GROWTH = 128  # tokens reserved for each session to grow by, so that it does not evict another one soon
SHARE = 16  # in a small cache, the reserve is at most one part in so many
REMEMBERED = 6  # records of own usage, half a second apart: they reach back beyond the oldest heartbeat in use


@dataclass(slots=True)
class CacheUse:
    """Usage of one replica's cache: tokens that sessions hold, and tokens kept for them, reserves included."""

    sessions: int = 0
    held: int = 0
    kept: int = 0

    def add(self, held: int, kept: int) -> None:
        """Add one session."""
        self.sessions += 1
        self.held += held
        self.kept += kept


def growth(active: ActiveSession, cache_tokens: int) -> int:
    """Tokens to reserve for a session in a cache of this size, at most what it may still generate."""
    most = active.session.request.sampling.max_tokens
    left = GROWTH if most is None else max(0, most - active.session.generated)
    return min(GROWTH, left, max(BLOCK, cache_tokens // SHARE))


def held(active: ActiveSession, role: Role) -> int:
    """Tokens of a session's stream, rounded up to whole blocks."""
    return -(-len(active.session.streams[role]) // BLOCK) * BLOCK


def need(active: ActiveSession, role: Role, replica: Replica) -> int:
    """Tokens that a session needs at a replica; 0 if its stream is longer than the model's positions."""
    welcome = replica.welcome
    if len(active.session.streams[role]) > welcome.max_position:
        return 0
    return held(active, role) + growth(active, welcome.cache_tokens)


@dataclass(slots=True)
class CacheSnapshot:
    """The caches at one moment, less what is given out since. shut: replicas at which an older session waits."""

    used: dict[Replica, CacheUse]
    others: Callable[[Replica, CacheUse], int]
    shut: set[Replica] = field(default_factory=set)

    def free(self, replica: Replica) -> int:
        """Tokens that are neither held by nor kept for a session."""
        used = self.used.get(replica, CacheUse())
        return replica.welcome.cache_tokens - used.kept - self.others(replica, used)

    def fits(self, replica: Replica, tokens: int) -> bool:
        """True if there is room. A coordinator's first session at a replica always fits: the replica itself decides."""
        if replica in self.shut:
            return False
        return not self.used.get(replica, CacheUse()).sessions or tokens <= self.free(replica)

    def take(self, active: ActiveSession, role: Role, replica: Replica) -> None:
        """Count a session that begins at a replica, or resumes there."""
        self.used.setdefault(replica, CacheUse()).add(held(active, role), need(active, role, replica))

    def choose(self, active: ActiveSession, role: Role, candidates: Sequence[Replica]) -> Replica | None:
        """A replica for a session: the emptier of two drawn at random, else any with room. None if none has room.

        Coordinators that all chose the emptiest replica would fill it together.
        """
        drawn = random.sample(candidates, min(2, len(candidates)))
        for choice in (drawn, candidates):
            best = max(choice, key=self.free)
            if self.fits(best, need(active, role, best)):
                return best
        return next((each for each in candidates if self.fits(each, need(active, role, each))), None)


class CacheBudget:
    """Estimates the use of the caches from the sessions of one coordinator and the replicas' heartbeats."""

    def __init__(self, active_sessions: Callable[[], Collection[ActiveSession]]) -> None:
        self._active = active_sessions
        self._past: deque[dict[Replica, CacheUse]] = deque(maxlen=REMEMBERED)

    def record(self) -> None:
        """Remember the present usage. Call every half second."""
        self._past.append(_used(self._active()))

    def snapshot(self) -> CacheSnapshot:
        """The caches at this moment."""
        return CacheSnapshot(_used(self._active()), self._others)

    def _others(self, replica: Replica, now: CacheUse) -> int:
        """Tokens that other coordinators' sessions hold, and their reserves."""
        endpoint, total = replica.endpoint, replica.welcome.cache_tokens
        if endpoint.cache_free is None:
            return 0
        recent = [now, *(uses[replica] for uses in self._past if replica in uses)]
        # The recent maximum: tokens released after the heartbeat must not count as another coordinator's.
        tokens = max(0, total - endpoint.cache_free - max(use.held for use in recent))
        sessions = max(0, endpoint.sessions - max(use.sessions for use in recent))
        return tokens + sessions * min(GROWTH, max(BLOCK, total // SHARE)) if tokens else 0


def _used(active_sessions: Iterable[ActiveSession]) -> dict[Replica, CacheUse]:
    used: dict[Replica, CacheUse] = {}
    for active in active_sessions:
        for role, replica in active.replicas.items():
            if role not in active.cache_waits and (role == active.primary or not active.past_context):
                used.setdefault(replica, CacheUse()).add(held(active, role), need(active, role, replica))
    return used
