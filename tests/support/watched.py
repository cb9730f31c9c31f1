"""Wrappers around engines through which a test can inspect and disturb them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from actors.api.generation import ROLES, Role
from actors.engine.interface import Extend, Outcome
from actors.replica.engine_thread import Engine
from tests.support.deadlines import HANG_S

Disturb = Callable[["WatchedEngine"], None]


class WatchedEngine:
    """Wraps an engine: records the extends, and calls `disturb` before each forward, on the engine's own thread."""

    def __init__(self, inner: Engine) -> None:
        self._inner = inner
        self.devices, self.rows_on_device = inner.devices, inner.rows_on_device
        self.extends: list[Extend] = []
        self.forwards = 0
        self.disturb: Disturb = lambda engine: None
        self._sessions: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def extend(self, batch: Sequence[Extend]) -> list[Outcome]:
        """One forward of the real engine."""
        self.extends += batch
        self.forwards += 1
        self._sessions |= {extend.session for extend in batch}
        self.disturb(self)
        return self._inner.extend(batch)

    def forget_everything(self) -> None:
        """Evict every session, as a cache under pressure may at any time."""
        for session in self._sessions:
            cast(Any, self._inner).evict(session)

    def clear(self) -> None:
        """Close every session."""
        for session in self._sessions:
            self._inner.close(session)


class Trio:
    """The three watched engines."""

    def __init__(self, engines: Mapping[Role, Engine]) -> None:
        self.watched = {role: WatchedEngine(engines[role]) for role in ROLES}

    @property
    def engines(self) -> Mapping[Role, Engine]:
        """The engines in the form that a service takes."""
        return cast(Mapping[Role, Engine], self.watched)

    def disturb(self, act: Disturb, *roles: Role) -> None:
        """Call `act` before every forward of these roles."""
        for role in roles or ROLES:
            self.watched[role].disturb = act

    def extended(self) -> dict[Role, int]:
        """Number of extends so far, by role."""
        return {role: len(engine.extends) for role, engine in self.watched.items()}

    def held(self) -> dict[Role, int]:
        """Number of sessions in each cache."""
        return {role: engine.cache_stats().sessions for role, engine in self.watched.items()}


@contextmanager
def watched(engines: Mapping[Role, Engine]) -> Iterator[Trio]:
    """Wrap the engines; sessions that are left in them are closed at the end."""
    trio = Trio(engines)
    try:
        yield trio
    finally:
        for engine in trio.watched.values():
            engine.clear()


async def until(condition: Callable[[], bool], seconds: float = HANG_S) -> None:
    """Wait until the condition holds. Raises AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.002)
