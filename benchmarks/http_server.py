"""The HTTP side of a service of plain processes: the router's application and a coordinator, behind uvicorn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import uvicorn

from actors.api.generation import CoordinatorEvent, Generate
from actors.config import ServiceConfig
from actors.coordinator.coordinator import Coordinator
from actors.coordinator.stats import CoordinatorLoad
from actors.directory import Endpoint
from actors.preflight import load_tokenizers
from actors.replica.process import collect_rarely
from benchmarks.exchange import connected
from cluster.launch import LOOPBACK, free_port
from router.api import create_app
from router.backend import Status
from router.failover import FailoverBackend


class CoordinatorWorker:
    """A coordinator in a process of its own. endpoints: the models that it connects to."""

    def __init__(self, config: ServiceConfig, secret: bytes, endpoints: Sequence[Endpoint]) -> None:
        self._endpoints = endpoints
        self._tokenizers = load_tokenizers(config)
        self._config = config
        self._coordinator = Coordinator(config, self._tokenizers, secret, self._locate)

    async def start(self) -> None:
        """Decode as soon as every role is connected."""
        await self._coordinator.start()
        collect_rarely()
        await connected(self._coordinator)

    async def load(self) -> CoordinatorLoad:
        """The coordinator's load."""
        return self._coordinator.load()

    async def stop(self) -> None:
        """Close every connection."""
        await self._coordinator.stop()

    async def _locate(self) -> Sequence[Endpoint]:
        return self._endpoints


class HttpServer(CoordinatorWorker):
    """A coordinator, and the router's application that has it as its only coordinator."""

    async def serve(self) -> str:
        """Answer HTTP on the loopback interface; the base URL."""
        port = free_port()
        app = create_app(self._config, self._tokenizers, FailoverBackend(self, self._config.deadlines))
        self._server = uvicorn.Server(
            uvicorn.Config(app, host=LOOPBACK, port=port, log_level="warning", lifespan="off", backlog=4_096)
        )
        self._serving = asyncio.get_running_loop().create_task(self._server.serve())
        while not self._server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        return f"http://{LOOPBACK}:{port}"

    def generate(self, request: Generate) -> AsyncIterator[CoordinatorEvent]:
        """See router.backend.Coordinators.generate."""
        return self._coordinator.generate(request)

    async def status(self) -> Status:
        """See router.backend.Coordinators.status."""
        return Status(self._coordinator.missing_roles())

    async def ending(self) -> bool:
        """See router.backend.Coordinators.ending."""
        return self._server.should_exit

    async def stop(self) -> None:
        """Stop answering, and close every connection."""
        self._server.should_exit = self._server.force_exit = True
        await self._serving
        await super().stop()
