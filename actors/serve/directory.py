"""The directory as a deployment of Ray Serve."""

from __future__ import annotations

import asyncio
import logging

from ray import serve

from actors.api.generation import Role
from actors.directory import HEARTBEAT_S, Directory, Endpoint, Loading, Snapshot
from actors.serve.application import DIRECTORY_TIMEOUT_S, stopping_replicas

log = logging.getLogger(__name__)


class DirectoryShell:
    """The directory as a deployment of one replica. If it is lost, its data is a few seconds out of date."""

    async def __init__(self) -> None:  # type: ignore[misc]  # awaited by Serve
        self._directory = Directory()
        self._leaving: frozenset[str] = frozenset()
        self._polling = asyncio.create_task(self._keep_polling(serve.get_replica_context().app_name))

    async def _keep_polling(self, application: str) -> None:
        while True:
            try:
                async with asyncio.timeout(DIRECTORY_TIMEOUT_S):
                    self._leaving = await stopping_replicas(application)
            except Exception as error:  # the controller may be unreachable for any reason
                log.info("the Serve controller does not answer: %s", type(error).__name__)
            await asyncio.sleep(HEARTBEAT_S)

    async def heartbeat(self, endpoint: Endpoint) -> None:
        """See Directory.heartbeat."""
        self._directory.heartbeat(endpoint)

    async def loading(self, progress: Loading) -> None:
        """See Directory.loading."""
        self._directory.loading(progress)

    async def leave(self, incarnation: str) -> None:
        """See Directory.leave."""
        self._directory.leave(incarnation)

    async def snapshot(self) -> Snapshot:
        """See Directory.snapshot. Includes the replicas that Serve is stopping."""
        return Snapshot(self._directory.snapshot(), self._leaving)

    async def awaited(self) -> dict[Role, str]:
        """See Directory.awaited."""
        return self._directory.awaited()
