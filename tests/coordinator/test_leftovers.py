"""Clients that leave and connections that are lost leave nothing in the caches."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from contextlib import aclosing

import pytest

from actors.api.generation import ROLES, Delta, Generate, Role
from actors.coordinator.coordinator import Coordinator
from actors.replica.engine_thread import Engine
from tests.support.local_service import LocalService, trio_config
from tests.support.relay import relayed
from tests.support.trio import mixed_requests

CLIENTS = 24
CUTS = 9
IDLE_S = 60.0  # after the last client, within which every session is closed


async def leave_after(coordinator: Coordinator, request: Generate, deltas: int) -> None:
    """Read so many deltas of an answer, or all of it, then close the stream."""
    async with aclosing(coordinator.generate(request)) as events:
        async for event in events:
            deltas -= isinstance(event, Delta)
            if deltas < 0:
                return


async def emptied(service: LocalService, role: Role) -> None:
    """Wait until a role's cache holds no session. Raises AssertionError if the cache's counts are inconsistent."""
    async with asyncio.timeout(IDLE_S):
        while await service.replicas[role].check_cache():  # noqa: ASYNC110 - the replica announces no last session
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("seed", [1, 2])
async def test_cancels_and_lost_connections_leave_no_session_in_a_cache(
    trio_engines: Mapping[Role, Engine], seed: int
) -> None:
    draw = random.Random(seed)
    async with relayed(trio_config(), trio_engines) as (service, relays):
        clients = [
            asyncio.create_task(leave_after(draw.choice(service.coordinators), one, draw.randrange(60)))
            for one in mixed_requests(service, CLIENTS)
        ]
        for _ in range(CUTS):
            await asyncio.sleep(draw.uniform(0, 0.1))
            relays[draw.choice(ROLES)].cut()
            await service.replicas[draw.choice(ROLES)].check_cache()
        await asyncio.gather(*clients)
        assert sum(relay.connections for relay in relays.values()) > len(ROLES)
        for role in ROLES:
            await emptied(service, role)
