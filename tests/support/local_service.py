"""The service without router and Ray, in one process: three model replicas, a directory, coordinators.

It uses the classes and sockets of the cluster, for tests and for measurements without Ray.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.api.generation import ROLES, Delta, Finished, Generate, Moved, PromptNote, Rejected, Role, TokenNote
from actors.config import ServiceConfig, load_config
from actors.coordinator.coordinator import Coordinator
from actors.directory import Endpoint
from actors.preflight import load_tokenizers
from actors.replica.build import load_role, serve_role
from actors.replica.engine_thread import Engine
from actors.replica.replica import ModelReplica
from actors.text.tokenizer import RoleTokenizer
from tests.support.deadlines import HANG_S

WEIGHTS = Path(__file__).parents[2] / "cluster" / "demo" / "weights"


def trio_config(**overrides: Any) -> ServiceConfig:
    """The embedded trio's configuration, batch-invariant unless overridden."""
    models = {role: {"path": str(WEIGHTS / role)} for role in ROLES}
    return load_config({"version": 1, "name": "demo", "batch_invariant": True, "models": models} | overrides)


LoadEngine = Callable[[ServiceConfig, Role], Engine]


def load_engines(config: ServiceConfig, load: LoadEngine = load_role) -> dict[Role, Engine]:
    """The engine of every role."""
    return {role: load(config, role) for role in ROLES}


class LocalService:
    """Replicas and coordinators of one application, in this process."""

    def __init__(self, config: ServiceConfig, engines: Mapping[Role, Engine]) -> None:
        self.config, self.engines = config, dict(engines)
        self.tokenizers: dict[Role, RoleTokenizer] = load_tokenizers(config)
        self.replicas: dict[Role, ModelReplica] = {}
        self.coordinators: list[Coordinator] = []
        self._secret = secrets.token_bytes(32)
        self._endpoints: dict[Role, Endpoint] = {}
        self.others: list[Endpoint] = []  # replicas that a caller runs beside these
        self.stopping: set[Role] = set()  # roles whose replica here is about to go

    async def start_replica(self, role: Role) -> None:
        """Start the replica of a role, or another in its place."""
        incarnation = secrets.token_hex(8)
        replica = serve_role(
            self.config,
            role,
            self.engines[role],
            self.tokenizers[role],
            incarnation=incarnation,
            secret=self._secret,
        )
        host, port = await replica.start()
        self._endpoints[role] = Endpoint(role, host, port, incarnation)
        self.replicas[role] = replica

    async def start_coordinator(self) -> None:
        """Start one more coordinator."""
        coordinator = Coordinator(self.config, self.tokenizers, self._secret, self._locate)
        await coordinator.start()
        self.coordinators.append(coordinator)

    async def stop(self) -> None:
        """Stop everything."""
        for coordinator in self.coordinators:
            await coordinator.stop()
        for replica in self.replicas.values():
            await replica.stop()

    async def _locate(self) -> Sequence[Endpoint]:
        return (*(self._endpoint(role) for role in self._endpoints), *self.others)

    def _endpoint(self, role: Role) -> Endpoint:
        load, stopping = self.replicas[role].load(), role in self.stopping
        return replace(self._endpoints[role], sessions=load.sessions, cache_free=load.cache_free, stopping=stopping)


@asynccontextmanager
async def local_service(
    config: ServiceConfig, engines: Mapping[Role, Engine], coordinators: int = 1
) -> AsyncIterator[LocalService]:
    """A running service whose coordinators are connected to every role."""
    service = LocalService(config, engines)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(service.stop)
        for role in ROLES:
            await service.start_replica(role)
        for _ in range(coordinators):
            await service.start_coordinator()
        async with asyncio.timeout(HANG_S):
            while any(c.missing_roles() for c in service.coordinators):  # noqa: ASYNC110 - a coordinator has no event for it
                await asyncio.sleep(0.01)
        yield service


class Answer:
    """One finished generation. first_token: when its first token came, by `time.perf_counter`; 0 without any."""

    def __init__(self) -> None:
        self.first_token = 0.0
        self.reasoning = self.content = ""
        self.tokens: list[int] = []
        self.notes: list[TokenNote] = []
        self.prompt: list[PromptNote] = []
        self.end: Finished | Rejected | Moved | None = None


async def decode(coordinator: Coordinator, request: Generate) -> Answer:
    """Run one request to its end."""
    answer = Answer()
    async with aclosing(coordinator.generate(request)) as events:
        async for event in events:
            if isinstance(event, Delta):
                if event.tokens and not answer.tokens:
                    answer.first_token = time.perf_counter()
                answer.reasoning += event.reasoning
                answer.content += event.content
                answer.tokens += event.tokens
                answer.notes += event.notes
                answer.prompt += event.prompt
            else:
                answer.end = event
    return answer
