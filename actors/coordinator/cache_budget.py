"""What is free in the models' caches, as far as one coordinator can tell.

Its own sessions' streams are known to the token. What others hold is what a replica last said to be taken, less what
this coordinator held there about that time: what a replica says is some heartbeats old.
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

GROWTH = 128  # tokens that are kept free for each session to grow by, so that it evicts nobody soon
SHARE = 16  # of a small cache, at most one part in so many for each session
REMEMBERED = 6  # notes of what was held here: half a second apart, they reach behind the oldest heartbeat in use


@dataclass(slots=True)
class CacheUse:
    """Of one replica's cache: tokens that sessions hold, and tokens kept for them, growth included."""

    sessions: int = 0
    held: int = 0
    kept: int = 0

    def add(self, held: int, kept: int) -> None:
        """One more session."""
        self.sessions += 1
        self.held += held
        self.kept += kept


def growth(active: ActiveSession, cache_tokens: int) -> int:
    """Tokens to keep free for a session in a cache of so many: none that it will never ask for."""
    most = active.session.request.sampling.max_tokens
    left = GROWTH if most is None else max(0, most - active.session.generated)
    return min(GROWTH, left, max(BLOCK, cache_tokens // SHARE))


def held(active: ActiveSession, role: Role) -> int:
    """Tokens of a session's stream, in whole blocks."""
    return -(-len(active.session.streams[role]) // BLOCK) * BLOCK


def need(active: ActiveSession, role: Role, replica: Replica) -> int:
    """Room that a session asks for at a replica; none where its prompt is past the model's positions."""
    welcome = replica.welcome
    if len(active.session.streams[role]) > welcome.max_position:
        return 0
    return held(active, role) + growth(active, welcome.cache_tokens)


@dataclass(slots=True)
class CacheSnapshot:
    """The caches at one moment; what is given out is taken off. shut: replicas where someone else is first."""

    used: dict[Replica, CacheUse]
    others: Callable[[Replica, CacheUse], int]
    shut: set[Replica] = field(default_factory=set)

    def free(self, replica: Replica) -> int:
        """Tokens that nobody holds and that are kept for nobody."""
        used = self.used.get(replica, CacheUse())
        return replica.welcome.cache_tokens - used.kept - self.others(replica, used)

    def fits(self, replica: Replica, tokens: int) -> bool:
        """Whether there is room. For the first session from here there always is: the replica itself decides."""
        if replica in self.shut:
            return False
        return not self.used.get(replica, CacheUse()).sessions or tokens <= self.free(replica)

    def take(self, active: ActiveSession, role: Role, replica: Replica) -> None:
        """A session begins there, or comes back."""
        self.used.setdefault(replica, CacheUse()).add(held(active, role), need(active, role, replica))

    def choose(self, active: ActiveSession, role: Role, candidates: Sequence[Replica]) -> Replica | None:
        """Where a session goes: of two drawn at random the one with more room, or wherever there is any. None: nowhere.

        Several coordinators that all took the emptiest one would fill it together.
        """
        drawn = random.sample(candidates, min(2, len(candidates)))
        for some in (drawn, candidates):
            best = max(some, key=self.free)
            if self.fits(best, need(active, role, best)):
                return best
        return next((each for each in candidates if self.fits(each, need(active, role, each))), None)


class CacheBudget:
    """Watches the caches through the sessions of one coordinator."""

    def __init__(self, active_sessions: Callable[[], Collection[ActiveSession]]) -> None:
        self._active = active_sessions
        self._notes: deque[dict[Replica, CacheUse]] = deque(maxlen=REMEMBERED)

    def note(self) -> None:
        """Remember what is held now. Call every half second."""
        self._notes.append(_used(self._active()))

    def snapshot(self) -> CacheSnapshot:
        """The caches now."""
        return CacheSnapshot(_used(self._active()), self._others)

    def _others(self, replica: Replica, now: CacheUse) -> int:
        """What other coordinators' sessions hold, and room for them to grow."""
        endpoint, total = replica.endpoint, replica.welcome.cache_tokens
        if endpoint.cache_free is None:
            return 0
        then = [now, *(note[replica] for note in self._notes if replica in note)]
        # The most that was held here lately: what has just been released must not count as somebody else's.
        tokens = max(0, total - endpoint.cache_free - max(use.held for use in then))
        sessions = max(0, endpoint.sessions - max(use.sessions for use in then))
        return tokens + sessions * min(GROWTH, max(BLOCK, total // SHARE)) if tokens else 0


def _used(active_sessions: Iterable[ActiveSession]) -> dict[Replica, CacheUse]:
    used: dict[Replica, CacheUse] = {}
    for active in active_sessions:
        for role, replica in active.replicas.items():
            if role not in active.cache_waits and (role == active.primary or not active.past_context):
                used.setdefault(replica, CacheUse()).add(held(active, role), need(active, role, replica))
    return used
