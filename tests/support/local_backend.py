"""A service of this process as a job's backend."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from actors.api.generation import Event, Generate, Moved
from router.backend import Status
from tests.support.local_service import LocalService


class Interruption(Exception):
    """Whatever ends a run at a random place."""


class LocalBackend:
    """Asks the first coordinator. stop_after: the request after so many raises Interruption."""

    def __init__(self, service: LocalService, stop_after: int | None = None) -> None:
        self._service, self._stop_after = service, stop_after
        self.asked = 0

    async def generate(self, request: Generate) -> AsyncIterator[Event]:
        """See router.backend.Backend.generate."""
        self.asked += 1
        if self._stop_after is not None and self.asked > self._stop_after:
            raise Interruption
        async with aclosing(self._service.coordinators[0].generate(request)) as events:
            async for event in events:
                assert not isinstance(event, Moved)  # this coordinator stays
                yield event

    async def status(self) -> Status:
        """Every role is there: the service waited for them."""
        return Status()
