"""Who is where: the model replicas of each role, their load, and what is still awaited.

Plain and without Ray. Replicas repeat what they say every second, so a directory that was lost fills itself again and
a replica that died is forgotten; nothing here needs to survive.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from actors.api.generation import ROLES, Role

HEARTBEAT_S = 1.0  # how often a replica says that it is there
EXPIRY_S = 4.0  # silence after which it is forgotten: three missed heartbeats and a slow fourth


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One model replica: where to connect, which start of it this is, and how full it is."""

    role: Role
    host: str
    port: int
    incarnation: str
    sessions: int = 0
    cache_free: int | None = None  # tokens; None: not told
    stopping: bool = False  # finishes what it has, takes no new session


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a coordinator wants to know. leaving: Serve's ids of the replicas, of any kind, that it is stopping."""

    endpoints: tuple[Endpoint, ...]
    leaving: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Loading:
    """A replica that is not ready yet: what it is doing, in words, and for how many seconds it has been starting."""

    role: Role
    incarnation: str
    doing: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.doing}, {self.seconds:.0f} s since it started"


class Directory:
    """The replicas heard of lately."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._endpoints: dict[str, tuple[float, Endpoint]] = {}  # by incarnation, with the time of the last heartbeat
        self._loading: dict[str, tuple[float, Loading]] = {}

    def heartbeat(self, endpoint: Endpoint) -> None:
        """A replica is there, or still there; the first one registers it."""
        self._loading.pop(endpoint.incarnation, None)
        self._endpoints[endpoint.incarnation] = (self._clock(), endpoint)

    def loading(self, progress: Loading) -> None:
        """A replica is on its way."""
        self._loading[progress.incarnation] = (self._clock(), progress)

    def leave(self, incarnation: str) -> None:
        """A replica is gone, on purpose. Unknown ones are ignored."""
        self._endpoints.pop(incarnation, None)
        self._loading.pop(incarnation, None)

    def snapshot(self) -> tuple[Endpoint, ...]:
        """Every replica heard of lately, those that are stopping included."""
        self._forget()
        return tuple(endpoint for _, endpoint in self._endpoints.values())

    def awaited(self) -> dict[Role, str]:
        """What each role that nobody serves is waiting for, in words; empty when every role is served."""
        self._forget()
        served = {endpoint.role for _, endpoint in self._endpoints.values() if not endpoint.stopping}
        words: dict[Role, str] = {role: "no replica has started" for role in ROLES if role not in served}
        for _, progress in self._loading.values():
            if progress.role in words:
                words[progress.role] = str(progress)
        return words

    def _forget(self) -> None:
        oldest = self._clock() - EXPIRY_S
        self._endpoints = {key: entry for key, entry in self._endpoints.items() if entry[0] >= oldest}
        self._loading = {key: entry for key, entry in self._loading.items() if entry[0] >= oldest}
