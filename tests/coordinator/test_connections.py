"""Connections between coordinator and replica that are cut, slow, stalled or repeat frames change no token."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from actors.api.generation import ROLES, Generate, Role
from actors.config import ServiceConfig
from actors.replica.engine_thread import Engine
from tests.support.local_service import LocalService, trio_config
from tests.support.relay import DIRECTIONS, Direction, Relay, relayed
from tests.support.tiers import slow
from tests.support.trio import LONG, alone, chat_prompts, decode_all, request, tokens
from tests.support.watched import until

RECOVERED_S = 120.0  # generous, for a busy machine: only a hang must exceed it
BOTH = (DIRECTIONS[0], *map(slow, DIRECTIONS[1:]))
FRAMES = 12  # that pass before something happens


def long_requests(service: LocalService, count: int) -> list[Generate]:
    """Requests for sampled answers of 60 tokens."""
    sampling = replace(LONG, max_tokens=60)
    texts = chat_prompts(count)
    return [request(service.tokenizers, text, sampling=sampling, seed=i) for i, text in enumerate(texts)]


async def passes(relay: Relay) -> None:
    """Wait until so many more frames have passed, with sessions in flight."""
    begun = relay.frames
    await until(lambda: relay.frames >= begun + FRAMES)


async def disturbed(
    config: ServiceConfig, engines: Mapping[Role, Engine], role: Role, act: Callable[[Relay], None]
) -> Relay:
    """Run `act` on a role's connection in mid-stream and check that no token changes. Returns the relay."""
    async with relayed(config, engines) as (service, relays):
        requests = long_requests(service, 3)
        expected = await alone(service, requests)
        relay = relays[role]
        running = asyncio.create_task(decode_all(service.coordinators[1], requests))
        await passes(relay)
        assert not running.done()
        act(relay)
        async with asyncio.timeout(RECOVERED_S):
            assert tokens(await running) == expected
        return relay


@pytest.mark.parametrize("role", ROLES)
async def test_a_cut_connection_is_reopened_and_changes_no_token(
    trio_engines: Mapping[Role, Engine], role: Role
) -> None:
    relay = await disturbed(trio_config(), trio_engines, role, Relay.cut)
    assert relay.connections == 2


async def test_repeatedly_cut_connections_change_no_token(trio_engines: Mapping[Role, Engine]) -> None:
    async with relayed(trio_config(), trio_engines) as (service, relays):
        requests = long_requests(service, 3)
        expected = await alone(service, requests)
        running = asyncio.create_task(decode_all(service.coordinators[1], requests))
        for role in ROLES * 2:
            await passes(relays[role])
            relays[role].cut()
        async with asyncio.timeout(RECOVERED_S):
            assert tokens(await running) == expected
        assert all(relay.connections >= 2 for relay in relays.values())


@pytest.mark.parametrize("direction", BOTH)
async def test_a_connection_that_delays_changes_no_token_and_stays(
    trio_engines: Mapping[Role, Engine], direction: Direction
) -> None:
    def delay(relay: Relay) -> None:
        relay.flows[direction].delay_s = 0.01

    relay = await disturbed(trio_config(), trio_engines, "guider", delay)
    assert relay.connections == 1


@pytest.mark.parametrize("direction", BOTH)
async def test_a_slow_connection_changes_no_token_and_stays(
    trio_engines: Mapping[Role, Engine], direction: Direction
) -> None:
    def throttle(relay: Relay) -> None:
        relay.flows[direction].rate = 200_000

    relay = await disturbed(trio_config(), trio_engines, "target", throttle)
    assert relay.connections == 1


@pytest.mark.parametrize("direction", BOTH)
@pytest.mark.parametrize("role", ["guider", slow("target")])
async def test_a_stalled_connection_is_reopened_and_changes_no_token(
    trio_engines: Mapping[Role, Engine], role: Role, direction: Direction
) -> None:
    def stall(relay: Relay) -> None:
        flow = relay.flows[direction]
        flow.open.clear()
        asyncio.get_running_loop().call_later(2.0, flow.open.set)  # the network is back, and the old connection gone

    relay = await disturbed(trio_config(deadlines={"peer_timeout_s": 0.5}), trio_engines, role, stall)
    assert relay.connections >= 2


@pytest.mark.parametrize("direction", BOTH)
async def test_a_repeated_frame_ends_the_connection_and_changes_no_token(
    trio_engines: Mapping[Role, Engine], direction: Direction, caplog: pytest.LogCaptureFixture
) -> None:
    def repeat(relay: Relay) -> None:
        relay.flows[direction].repeat = True

    relay = await disturbed(trio_config(), trio_engines, "target", repeat)
    assert relay.connections == 2
    assert "altered, replayed or dropped" in caplog.text


async def test_a_replica_whose_rows_have_another_width_is_not_used(
    trio_engines: Mapping[Role, Engine], caplog: pytest.LogCaptureFixture
) -> None:
    service = LocalService(trio_config(), trio_engines)
    try:
        for role in ROLES:
            await service.start_replica(role)
        service.tokenizers["guider"].width += 1
        await service.start_coordinator()
        await until(lambda: "it is not used" in caplog.text)
        await until(lambda: service.coordinators[0].missing_roles() == ("guider",))
    finally:
        await service.stop()
