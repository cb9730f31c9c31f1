"""A coordinator as a deployment of Ray Serve."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from ray import serve
from ray.serve.handle import DeploymentHandle

from actors.api.generation import CoordinatorEvent, Generate, Role
from actors.config import ServiceConfig
from actors.coordinator.coordinator import Coordinator
from actors.coordinator.stats import CoordinatorLoad
from actors.directory import Endpoint, Snapshot
from actors.preflight import load_tokenizers
from actors.replica.process import collect_rarely, return_freed_memory
from actors.serve.application import DIRECTORY_TIMEOUT_S, own_secret, show_logs
from actors.serve.ray_metrics import keep_exporting
from actors.wire.tls import client_context


class CoordinatorShell:
    """One coordinator as a deployment. A client that disconnects cancels its generation."""

    async def __init__(  # type: ignore[misc]  # awaited by Serve
        self, config: ServiceConfig, directory: DeploymentHandle, models: Sequence[DeploymentHandle]
    ) -> None:
        """models: bound so that they belong to the application. Their addresses come from the directory."""
        show_logs()
        this = serve.get_replica_context().replica_tag

        async def locate() -> Sequence[Endpoint]:
            async with asyncio.timeout(DIRECTORY_TIMEOUT_S):
                snapshot: Snapshot = await directory.snapshot.remote()
            if this in snapshot.leaving:
                self._coordinator.hand_over()
            return snapshot.endpoints

        self._config = config
        tokenizers = await asyncio.to_thread(load_tokenizers, config)
        self._coordinator = Coordinator(config, tokenizers, await own_secret(), locate, tls=client_context())
        await self._coordinator.start()
        self._exporting = asyncio.create_task(keep_exporting(self._coordinator.measured))
        collect_rarely()
        return_freed_memory()

    async def generate(self, request: Generate) -> AsyncIterator[CoordinatorEvent]:
        """See Coordinator.generate."""
        async with contextlib.aclosing(self._coordinator.generate(request)) as events:
            async for event in events:
                yield event

    async def config(self) -> ServiceConfig:
        """The configuration of the service."""
        return self._config

    async def missing_roles(self) -> tuple[Role, ...]:
        """See Coordinator.missing_roles."""
        return self._coordinator.missing_roles()

    async def load(self) -> CoordinatorLoad:
        """See Coordinator.load."""
        return self._coordinator.load()

    async def __del__(self) -> None:
        if hasattr(self, "_exporting"):
            self._exporting.cancel()
            await self._coordinator.stop()
