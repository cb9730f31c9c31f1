"""Clients that close their connections in the middle of streams, over HTTP, before a service with real models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

import httpx

from actors.forward import Engine
from actors.requests import ROLES, Generate, Role, Told
from benchmarks.local import LocalService, local_service, trio_config
from router.api import create_app
from router.backend import Status
from router.resume import Resuming
from tests.router.service import serving
from tests.test_leftovers import IDLE_S, emptied

CLIENTS = 100
AT_ONCE = 25


class Local:
    """The coordinator of a service in this process, as the router knows coordinators."""

    def __init__(self, service: LocalService) -> None:
        self._coordinator = service.coordinators[0]

    def generate(self, request: Generate) -> AsyncIterator[Told]:
        return self._coordinator.generate(request)

    async def status(self) -> Status:
        return Status(self._coordinator.missing_roles())

    async def ending(self) -> bool:
        return False


async def test_a_hundred_clients_that_disconnect_in_mid_stream_leave_no_session_behind(
    trio_engines: Mapping[Role, Engine],
) -> None:
    turn = asyncio.Semaphore(AT_ONCE)
    async with local_service(trio_config(), trio_engines) as service:
        coordinator = service.coordinators[0]
        app = create_app(service.config, service.tokenizers, Resuming(Local(service), service.config.deadlines))

        async def leave(http: httpx.AsyncClient, number: int) -> int:
            body = {
                "model": "demo",
                "prompt": f"Who is Ada? {number}",
                "max_tokens": 300,
                "min_tokens": 300,
                "stream": True,
            }
            async with turn, http.stream("POST", "/v1/completions", json=body) as response:
                lines = response.aiter_lines()
                assert (await anext(lines)).startswith("data: ")
                return coordinator.load().sessions

        limits = httpx.Limits(max_connections=AT_ONCE)
        async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=IDLE_S, limits=limits) as http:
            running = await asyncio.gather(*(leave(http, number) for number in range(CLIENTS)))
            assert min(running) > 0
            async with asyncio.timeout(IDLE_S):
                while coordinator.load().sessions:  # noqa: ASYNC110 - nobody announces it
                    await asyncio.sleep(0.02)
            for role in ROLES:
                await emptied(service, role)
