"""A service in this process as the backend of a job."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from actors.api.generation import Event, Generate, Moved
from router.backend import Status
from tests.support.local_service import LocalService


class Interruption(Exception):
    """Ends a run at a chosen place, in place of an unexpected error."""


class LocalBackend:
    """Sends requests to the first coordinator. stop_after: requests after that many raise Interruption."""

    def __init__(self, service: LocalService, stop_after: int | None = None) -> None:
        self._service, self._stop_after = service, stop_after
        self.requests = 0

    async def generate(self, request: Generate) -> AsyncIterator[Event]:
        """See router.backend.Backend.generate."""
        self.requests += 1
        if self._stop_after is not None and self.requests > self._stop_after:
            raise Interruption
        async with aclosing(self._service.coordinators[0].generate(request)) as events:
            async for event in events:
                assert not isinstance(event, Moved)  # this coordinator stays
                yield event

    async def status(self) -> Status:
        """Every role is ready: the service waited for them."""
        return Status()
