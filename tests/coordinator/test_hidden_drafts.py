"""Drafts that the guider makes while others are verified change no token, whatever becomes of them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest

from actors.api.generation import ROLES, Role
from actors.replica.engine_thread import Engine
from benchmarks.workers import hidden_drafts
from tests.coordinator.test_speculation import answers, drafting, varied_requests, with_drafts
from tests.support.deadlines import HANG_S
from tests.support.local_service import LocalService, local_service
from tests.support.trio import LONG
from tests.support.watched import Trio, WatchedEngine, until, watched


@pytest.fixture
def trio(trio_engines: Mapping[Role, Engine]) -> Iterator[Trio]:
    """The trio, as if each model had a device of its own."""
    with watched(trio_engines) as trio:
        for role, engine in trio.watched.items():
            engine.devices = (role,)
        yield trio


@pytest.fixture(autouse=True)
def no_failed_turn(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A turn that fails loses replies; sessions recover, so that tokens alone do not show it."""
    yield
    assert "a turn failed" not in caplog.text


def hidden(service: LocalService) -> int:
    """Drafts so far that were made while others were verified."""
    return hidden_drafts(service.coordinators[0].measured())


async def test_drafts_made_meanwhile_are_verified_and_change_no_token(trio: Trio) -> None:
    async with local_service(drafting(), trio.engines) as service:
        requests = varied_requests(service, 20)
        expected = await answers(service, with_drafts(requests, 0))
        assert hidden(service) == 0
        assert await answers(service, with_drafts(requests)) == expected
        assert hidden(service) > 20


async def test_no_token_depends_on_the_order_in_which_models_answer(trio: Trio) -> None:
    late = random.Random(5)

    def disturb(engine: WatchedEngine) -> None:
        time.sleep(late.choice((0, 0, 0, 1, 2, 4, 8)) / 1_000)

    widening = {"max_unseen_mass": 0.02, "audit_every": 7}
    async with local_service(drafting(exchange=widening), trio.engines) as service:
        requests = varied_requests(service, 20)
        expected = await answers(service, with_drafts(requests, 0))
        trio.disturb(disturb)
        for drafts in (None, 0, 3):
            assert await answers(service, with_drafts(requests, drafts)) == expected


async def test_a_guider_that_shares_its_device_drafts_nothing_meanwhile(trio: Trio) -> None:
    trio.watched["guider_base"].devices = ("guider",)
    async with local_service(drafting(), trio.engines) as service:
        await answers(service, with_drafts(varied_requests(service)[:4]))
        assert hidden(service) == 0


@pytest.mark.parametrize("role", ROLES)
async def test_lost_caches_and_failing_forwards_change_no_token(trio: Trio, role: Role) -> None:
    def disturb(engine: WatchedEngine) -> None:
        if engine.forwards % 5 == 3:
            raise RuntimeError("a fault in the middle")
        if engine.forwards % 4 == 0:
            engine.forget_everything()

    async with local_service(drafting(), trio.engines) as service:
        requests = varied_requests(service)[:12]
        expected = await answers(service, with_drafts(requests, 0))
        trio.disturb(disturb, role)
        assert await answers(service, with_drafts(requests)) == expected


async def test_a_guider_lost_while_it_drafts_ahead_changes_no_token(trio: Trio) -> None:
    async with local_service(drafting(), trio.engines) as service:
        requests = [
            replace(one, sampling=replace(LONG, max_tokens=120), drafts=4) for one in varied_requests(service)[:4]
        ]
        expected = await answers(service, with_drafts(requests, 0))
        stop_at = trio.watched["guider"].forwards + 15
        going = asyncio.ensure_future(answers(service, requests))
        await until(lambda: trio.watched["guider"].forwards >= stop_at)
        await service.replicas["guider"].stop()
        await service.start_replica("guider")
        assert await asyncio.wait_for(going, HANG_S) == expected


async def test_drafts_that_are_not_taken_leave_nothing_in_a_cache(trio: Trio) -> None:
    async with local_service(drafting(), trio.engines) as service:
        await answers(service, with_drafts(varied_requests(service)[:10]))
        await until(lambda: set(trio.held().values()) == {0})
        assert service.coordinators[0].load().sessions == 0


async def test_a_window_that_ends_before_its_hidden_drafts_are_requested_drafts_anew(trio: Trio) -> None:
    """With whole rows nothing is looked up, so a window may end in the turn in which the guider's rows arrive."""
    async with local_service(drafting(exchange={"mode": "full"}), trio.engines) as service:
        requests = [replace(one, sampling=replace(LONG, temperature=0)) for one in varied_requests(service)[:3]]
        expected = await answers(service, with_drafts(requests, 0))
        async with asyncio.timeout(HANG_S):
            assert await answers(service, with_drafts(requests)) == expected
        assert hidden(service) > 0
