"""A hundred clients that leave in mid-stream leave no session in any model."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn

from actors.api.generation import ROLES, CoordinatorEvent, Generate, Role
from actors.coordinator.coordinator import Coordinator
from actors.replica.engine_thread import Engine
from cluster.launch import LOOPBACK, free_port
from router.api import create_app
from router.backend import Status
from router.failover import FailoverBackend
from tests.support.local_service import LocalService, local_service, trio_config
from tests.support.watched import until

CLIENTS = 100
TOKENS = 1_000  # of each answer: more than any client stays for
IDLE_S = 120.0  # after the last client, within which every session is closed
NAMES = ("Ada", "Ben", "Cy", "Dora", "Eve")


class One:
    """A back end with a single coordinator."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def generate(self, request: Generate) -> AsyncIterator[CoordinatorEvent]:
        return self._coordinator.generate(request)

    async def status(self) -> Status:
        return Status(self._coordinator.missing_roles())

    async def ending(self) -> bool:
        return False


@asynccontextmanager
async def over_http(service: LocalService) -> AsyncIterator[str]:
    """The base URL of a service on the loopback interface."""
    backend = FailoverBackend(One(service.coordinators[0]), service.config.deadlines)
    port = free_port()
    app = create_app(service.config, service.tokenizers, backend)
    server = uvicorn.Server(
        uvicorn.Config(app, host=LOOPBACK, port=port, log_config=None, lifespan="off", access_log=False)
    )
    serving = asyncio.create_task(server.serve())
    try:
        await until(lambda: server.started)
        yield f"http://{LOOPBACK}:{port}"
    finally:
        server.should_exit = server.force_exit = True
        await serving


async def stay(http: httpx.AsyncClient, number: int, leave: asyncio.Event, begun: asyncio.Semaphore) -> None:
    """Read a stream until its first text and until `leave` is set, then close the connection."""
    question = f"Who is the mentor of the rival of {NAMES[number % len(NAMES)]}? {number}"
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "temperature": 1.0,
        "min_tokens": TOKENS,
        "max_tokens": TOKENS,
    }
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        lines = response.aiter_lines()  # kept: the response closes with its iterator
        async for line in lines:
            if line.startswith("data: "):
                assert "error" not in json.loads(line.removeprefix("data: "))
                begun.release()
                break
        await leave.wait()


async def test_clients_that_leave_mid_stream_leave_no_session_in_any_model(
    trio_engines: Mapping[Role, Engine], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "router.request_log")
    config = trio_config(coordinator={"max_sessions": CLIENTS, "max_waiting": 0})
    leave, begun = asyncio.Event(), asyncio.Semaphore(0)
    async with local_service(config, trio_engines) as service, over_http(service) as url:
        unlimited = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=IDLE_S, limits=unlimited) as http:
            clients = [asyncio.create_task(stay(http, number, leave, begun)) for number in range(CLIENTS)]
            async with asyncio.timeout(IDLE_S):
                for _ in clients:
                    await begun.acquire()
            assert service.coordinators[0].load().sessions == CLIENTS
            for role in ROLES:
                load = service.replicas[role].load()
                assert load.sessions == CLIENTS
                assert load.cache_used > CLIENTS
            leave.set()
            await asyncio.gather(*clients)
        await until(lambda: service.coordinators[0].load().sessions == 0, IDLE_S)
        for role in ROLES:
            await until(lambda role=role: service.replicas[role].load().sessions == 0, IDLE_S)  # type: ignore[misc]
            async with asyncio.timeout(IDLE_S):
                while await service.replicas[role].check_cache():  # noqa: ASYNC110 - forwards may still end
                    await asyncio.sleep(0.02)
            assert service.replicas[role].load().cache_used == 0
    ended: list[dict[str, Any]] = [json.loads(r.getMessage()) for r in caplog.records if r.name == "router.request_log"]
    assert [line["status"] for line in ended] == [499] * CLIENTS
    assert all(0 < line["completion_tokens"] < TOKENS for line in ended)
