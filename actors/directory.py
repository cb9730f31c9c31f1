"""The directory: addresses and load of all model replicas, and the progress of those that are loading.

Plain Python, without Ray. It holds no state that must survive: replicas send a heartbeat every second, so a restarted
directory fills itself again, and a replica that died expires.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from actors.api.generation import ROLES, Role

HEARTBEAT_S = 1.0  # interval of a replica's heartbeats
EXPIRY_S = 4.0  # a replica without a heartbeat for so long is removed: three are missing and the fourth is late


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One model replica: its address, its load, and the incarnation, which identifies this start of its process."""

    role: Role
    host: str
    port: int
    incarnation: str
    sessions: int = 0
    cache_free: int | None = None  # tokens; None: unknown
    stopping: bool = False  # it serves its sessions but takes no new ones


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The directory as coordinators read it. leaving: Serve's ids of the replicas, of any deployment, that it stops."""

    endpoints: tuple[Endpoint, ...]
    leaving: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Loading:
    """A replica that is not ready yet: its current step as a phrase, and the seconds since it started."""

    role: Role
    incarnation: str
    doing: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.doing}, {self.seconds:.0f} s since it started"


class Directory:
    """The model replicas with a recent heartbeat, and those that reported loading progress."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._endpoints: dict[str, tuple[float, Endpoint]] = {}  # by incarnation, with the time of the last heartbeat
        self._loading: dict[str, tuple[float, Loading]] = {}

    def heartbeat(self, endpoint: Endpoint) -> None:
        """Record a heartbeat; the first one registers the replica."""
        self._loading.pop(endpoint.incarnation, None)
        self._endpoints[endpoint.incarnation] = (self._clock(), endpoint)

    def loading(self, progress: Loading) -> None:
        """Record the progress of a replica that is loading."""
        self._loading[progress.incarnation] = (self._clock(), progress)

    def leave(self, incarnation: str) -> None:
        """Remove a replica that shuts down. Unknown ones are ignored."""
        self._endpoints.pop(incarnation, None)
        self._loading.pop(incarnation, None)

    def snapshot(self) -> tuple[Endpoint, ...]:
        """Every replica with a recent heartbeat, those that are stopping included."""
        self._forget()
        return tuple(endpoint for _, endpoint in self._endpoints.values())

    def awaited(self) -> dict[Role, str]:
        """A phrase for each role without a serving replica: what it is waiting for. Empty if all roles are served."""
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
