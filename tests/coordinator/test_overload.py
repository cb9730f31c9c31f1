"""More sessions than the caches hold are all answered, and few tokens are computed twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from actors.api.generation import ROLES, Finished, Generate, Rejected, Role
from actors.api.guidance import Guidance
from actors.config import ServiceConfig
from actors.replica.build import load_role
from actors.replica.engine_thread import Engine
from tests.support.local_service import WEIGHTS, LocalService, decode, local_service, trio_config
from tests.support.trio import LONG, alone, chat_prompts, decode_all, request, tokens
from tests.support.watched import until, watched

MOST = 1.7  # tokens that go through a model, over those that would with room for all


def crowded(caches: Mapping[Role, int], **overrides: Any) -> ServiceConfig:
    """A configuration with so many cache tokens for each role."""
    models = {role: {"path": str(WEIGHTS / role), "cache_tokens": caches.get(role, 4_096)} for role in ROLES}
    return trio_config(models=models, **overrides)


@asynccontextmanager
async def crowded_service(config: ServiceConfig, coordinators: int = 1) -> AsyncIterator[LocalService]:
    engines: dict[Role, Engine] = {role: load_role(config, role) for role in ROLES}
    async with local_service(config, engines, coordinators) as service:
        yield service


def long_requests(service: LocalService, count: int, length: int = 100, *, alpha: float = 1.0) -> list[Generate]:
    return [
        request(
            service.tokenizers, text, sampling=replace(LONG, max_tokens=length), guidance=Guidance(alpha), seed=number
        )
        for number, text in enumerate(chat_prompts(count))
    ]


def needed(requests: Sequence[Generate], answers: Sequence[Sequence[int]], role: Role) -> int:
    """Number of tokens that a role's model must compute."""
    return sum(len(one.prompts[role]) + len(answer) for one, answer in zip(requests, answers, strict=True))


async def everything_released(service: LocalService) -> None:
    await until(lambda: all(replica.load().sessions == 0 for replica in service.replicas.values()))
    await until(lambda: all(replica.load().cache_used == 0 for replica in service.replicas.values()))
    for replica in service.replicas.values():
        assert not await replica.check_cache()


@pytest.mark.slow
async def test_small_caches_of_different_sizes_block_no_session_forever(
    trio_engines: Mapping[Role, Engine],
) -> None:
    config = crowded({"target": 384, "guider": 320, "guider_base": 256}, speculation={"drafts": 0})
    with watched(trio_engines) as trio:
        async with local_service(trio_config(), trio.engines) as service:
            requests = long_requests(service, 6, 90)
            expected = await alone(service, requests)
    async with crowded_service(config) as service:
        assert tokens(await decode_all(service.coordinators[0], requests)) == expected
        for role in ROLES:
            forwarded, must = service.replicas[role].stats().tokens, needed(requests, expected, role)
            print(f"{role}: {forwarded} tokens went through it, {must} were needed")  # shown with -rP
            assert forwarded <= MOST * must
        await everything_released(service)


async def test_two_coordinators_that_share_small_caches_both_finish(
    trio_engines: Mapping[Role, Engine],
) -> None:
    config = crowded({"target": 384, "guider": 256, "guider_base": 320})
    with watched(trio_engines) as trio:
        async with local_service(trio_config(), trio.engines) as service:
            requests = long_requests(service, 6, 90)
            expected = await alone(service, requests)
    async with crowded_service(config, coordinators=2) as service:
        halves = [requests[0::2], requests[1::2]]
        answers = await asyncio.gather(*map(decode_all, service.coordinators, halves))
        assert [tokens(half) for half in answers] == [expected[0::2], expected[1::2]]
        for role in ROLES:
            forwarded, must = service.replicas[role].stats().tokens, needed(requests, expected, role)
            print(f"{role}: {forwarded} tokens went through it, {must} were needed")
            assert forwarded <= 2 * MOST * must  # wrong drafts go through it too
        await everything_released(service)


async def test_as_many_sessions_run_as_the_cache_holds() -> None:
    async with crowded_service(crowded({"guider": 512})) as service:
        coordinator = service.coordinators[0]
        running = asyncio.create_task(decode_all(coordinator, long_requests(service, 12, 60)))
        await until(lambda: coordinator.load().waiting > 0 and coordinator.load().sessions > 1)
        load = coordinator.load()
        assert load.sessions + load.waiting == 12
        assert load.sessions >= 512 // (32 + 60)
        tokens(await running)
        await everything_released(service)


async def test_a_prompt_that_no_cache_holds_is_refused_at_once() -> None:
    async with crowded_service(crowded({"guider": 128})) as service:
        coordinator, long_text = service.coordinators[0], " ".join(chat_prompts(24))
        guided = await decode(coordinator, request(service.tokenizers, long_text))
        assert isinstance(guided.end, Rejected)
        assert guided.end.code == "invalid"
        assert "guider" in guided.end.message
        bare = request(service.tokenizers, long_text, guidance=Guidance(0.0), roles=("target",))
        assert isinstance((await decode(coordinator, bare)).end, Finished)


async def test_a_busy_client_makes_way_for_another_when_the_queue_is_full(trio_engines: Mapping[Role, Engine]) -> None:
    config = trio_config(coordinator={"max_sessions": 1, "max_waiting": 2})
    with watched(trio_engines) as trio:
        async with local_service(config, trio.engines) as service:
            coordinator = service.coordinators[0]
            busy = [replace(one, client="busy") for one in long_requests(service, 3)]
            running = [asyncio.create_task(decode(coordinator, one)) for one in busy]
            await until(lambda: coordinator.load().sessions == 1 and coordinator.load().waiting == 2)
            (refused,) = [event async for event in coordinator.generate(replace(busy[0], client="busy"))]
            assert isinstance(refused, Rejected)
            calm = await decode(coordinator, replace(busy[0], client="calm", seed=9))
            assert isinstance(calm.end, Finished)
            first, second, youngest = await asyncio.gather(*running)
            tokens([first, second, calm])
            assert isinstance(youngest.end, Rejected)
            assert youngest.end.code == "overloaded"
            assert 1 <= (youngest.end.retry_after_s or 0) <= 60
