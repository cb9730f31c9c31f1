"""Recovery of the decode loop: lost or small caches, replicas that fail, hang, die or stay away."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from actors.api.generation import ROLES, Finished, Role
from actors.api.guidance import Guidance
from actors.config import ServiceConfig
from actors.coordinator.exchange import Exchange
from actors.coordinator.inflight import Calls, InflightCalls, Lookups
from actors.coordinator.session import ActiveSession
from actors.coordinator.states import SessionState
from actors.decoding.candidates import Ids
from actors.replica.engine_thread import Engine
from tests.support.deadlines import HANG_S
from tests.support.local_service import WEIGHTS, LoadEngine, LocalService, decode, local_service, trio_config
from tests.support.near_ties import all_same, same
from tests.support.trio import LONG, TEXT, alone, chat_prompts, decode_all, finished, mixed_requests, request, tokens
from tests.support.watched import Trio, WatchedEngine, until, watched


@pytest.fixture
def trio(trio_engines: Mapping[Role, Engine]) -> Iterator[Trio]:
    with watched(trio_engines) as trio:
        yield trio


def with_cache(role: Role, cache_tokens: int, **overrides: Any) -> ServiceConfig:
    """A configuration with so many cache tokens for one role."""
    models: dict[str, dict[str, Any]] = {each: {"path": str(WEIGHTS / each)} for each in ROLES}
    models[role]["cache_tokens"] = cache_tokens
    return trio_config(models=models, **overrides)


def forgetful(every: int) -> Any:
    """An action that evicts all sessions before every `every`-th forward."""

    def act(engine: WatchedEngine) -> None:
        if engine.forwards % every == 0:
            engine.forget_everything()

    return act


@pytest.mark.parametrize("role", ROLES)
async def test_a_lost_cache_changes_no_token(trio: Trio, role: Role) -> None:
    async with local_service(trio_config(exchange={"k": 8}), trio.engines) as service:
        requests = mixed_requests(service, 6)
        expected = await alone(service, requests)
        trio.disturb(forgetful(every=3), role)
        assert all_same(tokens(await decode_all(service.coordinators[0], requests)), expected)


async def test_caches_lost_everywhere_at_once_change_no_token(trio: Trio) -> None:
    async with local_service(trio_config(), trio.engines) as service:
        requests = mixed_requests(service, 6)
        expected = await alone(service, requests)
        trio.disturb(forgetful(every=2))
        assert all_same(tokens(await decode_all(service.coordinators[0], requests)), expected)


async def test_a_forward_that_fails_changes_no_token(trio: Trio) -> None:
    def fail(engine: WatchedEngine) -> None:
        if engine.forwards % 7 == 3:
            raise RuntimeError("a fault in the middle")

    async with local_service(trio_config(), trio.engines) as service:
        requests = mixed_requests(service, 4)
        expected = await alone(service, requests)
        trio.disturb(fail)
        assert all_same(tokens(await decode_all(service.coordinators[0], requests)), expected)


async def test_a_model_that_always_fails_ends_its_sessions_with_an_error(trio: Trio) -> None:
    def fail(engine: WatchedEngine) -> None:
        raise RuntimeError("a fault every time")

    async with local_service(trio_config(), trio.engines) as service:
        trio.disturb(fail, "guider")
        end = finished(await decode(service.coordinators[0], request(service.tokenizers, TEXT)))
        assert end.reason == "error"
        assert "guider" in str(end.error)
        unguided = request(service.tokenizers, TEXT, guidance=Guidance(0.0))
        assert finished(await decode(service.coordinators[0], unguided)).reason == "stop"


async def test_sessions_wait_for_a_full_cache_without_a_disconnect(
    trio: Trio, trio_engines: Mapping[Role, Engine], load_engine: LoadEngine, caplog: pytest.LogCaptureFixture
) -> None:
    crowded = with_cache("target", 256, deadlines={"step_s": 0.5})
    endless = replace(LONG, max_tokens=220)
    async with local_service(trio_config(), trio.engines) as service:
        requests = [
            request(service.tokenizers, text, sampling=endless, guidance=Guidance(0.0), seed=i)
            for i, text in enumerate(chat_prompts(3))
        ]
        expected = tokens(await decode_all(service.coordinators[0], requests))
    async with local_service(crowded, {**trio_engines, "target": load_engine(crowded, "target")}) as service:
        assert all_same(tokens(await decode_all(service.coordinators[0], requests)), expected)
    assert "giving up" not in caplog.text


async def test_sessions_that_exceed_a_cache_together_change_no_token(
    trio: Trio, trio_engines: Mapping[Role, Engine], load_engine: LoadEngine, caplog: pytest.LogCaptureFixture
) -> None:
    crowded = with_cache("guider", 256)
    async with local_service(trio_config(), trio.engines) as service:
        requests = [
            request(service.tokenizers, text, sampling=replace(LONG, max_tokens=140), seed=i)
            for i, text in enumerate(chat_prompts(3))
        ]
        expected = tokens(await decode_all(service.coordinators[0], requests))
    async with local_service(crowded, {**trio_engines, "guider": load_engine(crowded, "guider")}) as service:
        assert all_same(tokens(await decode_all(service.coordinators[0], requests)), expected)
        forwarded = service.replicas["guider"].stats().tokens
    needed = sum(len(one.prompts["guider"]) + len(answer) for one, answer in zip(requests, expected, strict=True))
    assert 256 < needed < forwarded
    print(f"{forwarded} tokens went through the guider, {needed} were needed")  # shown with -rP
    assert "giving up" not in caplog.text


async def test_a_hanging_replica_is_dropped_and_its_sessions_resume_later(
    trio: Trio, caplog: pytest.LogCaptureFixture
) -> None:
    async with local_service(trio_config(deadlines={"step_s": 1.5}), trio.engines) as service:
        requests = mixed_requests(service, 3)
        expected = await alone(service, requests)
        free, hung = threading.Event(), threading.Event()

        def hang(engine: WatchedEngine) -> None:
            hung.set()
            assert free.wait(20)

        trio.disturb(hang, "guider")
        running = asyncio.create_task(decode_all(service.coordinators[0], requests))
        await until(lambda: hung.is_set() and "giving up the connection to guider" in caplog.text)
        assert "to target" not in caplog.text
        free.set()
        assert all_same(tokens(await running), expected)


async def test_a_prompt_whose_chunks_together_take_longer_than_a_step_may_is_no_hang(
    trio: Trio, caplog: pytest.LogCaptureFixture
) -> None:
    models = {role: {"path": str(WEIGHTS / role), "prefill_chunk": 8} for role in ROLES}
    async with local_service(trio_config(deadlines={"step_s": 1.0}, models=models), trio.engines) as service:
        short = replace(LONG, max_tokens=1)
        asked = request(service.tokenizers, TEXT * 4, sampling=short, guidance=Guidance(0.0))
        trio.disturb(lambda engine: time.sleep(0.3), "target")
        assert len(asked.prompts["target"]) > 40  # six chunks, each within the deadline
        assert finished(await decode(service.coordinators[0], asked)).reason == "length"
    assert "giving up" not in caplog.text


async def test_a_window_that_no_model_owes_an_answer_begins_anew(
    trio: Trio, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = InflightCalls.find
    lost: list[Role] = []

    def lossy(self: InflightCalls, call_ids: NDArray[np.uint64]) -> Iterator[tuple[Calls, Ids, Ids]]:
        for calls, numbers, items in found(self, call_ids):
            if isinstance(calls, Lookups) and len(lost) < 3:
                lost.append(calls.role)
                self.end(calls, numbers)
            else:
                yield calls, numbers, items

    async with local_service(trio_config(deadlines={"step_s": 1}), trio.engines) as service:
        requests = mixed_requests(service, 3)
        expected = await alone(service, requests)
        monkeypatch.setattr(InflightCalls, "find", lossy)
        async with asyncio.timeout(HANG_S):
            assert all_same(tokens(await decode_all(service.coordinators[0], requests)), expected)
    assert len(lost) == 3
    assert "an answer that no model owed" in caplog.text


async def stop_replica(service: LocalService, role: Role) -> None:
    """Stop a replica and wait until its engine thread has ended."""
    replica = service.replicas[role]
    await replica.stop()
    await asyncio.to_thread(replica._thread._thread.join, 10)


@pytest.mark.parametrize("role", ROLES)
async def test_a_replica_that_dies_and_is_replaced_changes_no_token(trio: Trio, role: Role) -> None:
    async with local_service(trio_config(), trio.engines) as service:
        requests = mixed_requests(service, 5)
        expected = await alone(service, requests)
        begun = trio.watched["target"].forwards
        running = asyncio.create_task(decode_all(service.coordinators[0], requests))
        await until(lambda: trio.watched["target"].forwards >= begun + 8)
        await stop_replica(service, role)
        trio.watched[role].clear()
        await service.start_replica(role)
        assert all_same(tokens(await running), expected)


async def test_a_bug_met_when_a_replica_returns_ends_one_session_only(
    trio: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with local_service(trio_config(), trio.engines) as service:
        requests = [request(service.tokenizers, TEXT, sampling=LONG, seed=seed) for seed in range(2)]
        expected = await alone(service, requests)
        begun = trio.watched["target"].forwards
        running = asyncio.create_task(decode_all(service.coordinators[0], requests))
        await until(lambda: trio.watched["target"].forwards >= begun + 4)
        loop = service.coordinators[0]._loop
        service._endpoints.pop("guider")
        await stop_replica(service, "guider")
        await until(lambda: {active.state for active in loop._active.values()} == {SessionState.NO_REPLICA})
        next_window, failed = loop._next_window, list[ActiveSession]()

        def fail_once(active: ActiveSession) -> None:
            if not failed:
                failed.append(active)
                raise RuntimeError("a bug")
            next_window(active)

        monkeypatch.setattr(loop, "_next_window", fail_once)
        trio.watched["guider"].clear()
        await service.start_replica("guider")
        answers = await running
    ends = [finished(answer).reason for answer in answers]
    assert sorted(ends) == ["error", "length"]
    assert same(answers[ends.index("length")].tokens, expected[ends.index("length")])


async def test_a_role_without_replicas_ends_the_session_naming_the_role(trio: Trio) -> None:
    async with local_service(trio_config(deadlines={"reconnect_timeout_s": 0.2}), trio.engines) as service:
        stream = service.coordinators[0].generate(request(service.tokenizers, TEXT, sampling=LONG))
        seen = [await anext(stream)]
        service._endpoints.pop("guider")
        await stop_replica(service, "guider")
        seen += [event async for event in stream]
        end = seen[-1]
        assert isinstance(end, Finished)
        assert end.reason == "error"
        assert "no replica of guider came back" in str(end.error)
        unguided = request(service.tokenizers, TEXT, guidance=Guidance(0.0))
        assert finished(await decode(service.coordinators[0], unguided)).reason == "stop"


async def test_a_failed_turn_loses_no_other_sessions_replies(
    trio: Trio, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with local_service(trio_config(), trio.engines) as service:
        requests = mixed_requests(service, 6)
        expected = await alone(service, requests)
        receive, turns = Exchange.receive, itertools.count()

        def losing(exchange: Exchange, messages: Any) -> Any:
            if messages and next(turns) % 10 == 9:  # the replies of this turn are gone
                raise RuntimeError("a fault of the program")
            return receive(exchange, messages)

        monkeypatch.setattr(Exchange, "receive", losing)
        answers = await decode_all(service.coordinators[0], requests)
    assert "a turn failed" in caplog.text
    assert all_same(tokens(answers), expected)


async def test_repeatedly_failing_turns_end_their_sessions(
    trio: Trio, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with local_service(trio_config(), trio.engines) as service:
        requests = mixed_requests(service, 3)
        expected = await alone(service, requests)
        with monkeypatch.context() as broken:
            broken.setattr(Exchange, "advance", lambda exchange: 1 / 0)
            async with asyncio.timeout(HANG_S):
                answers = await decode_all(service.coordinators[0], requests)
        assert [finished(answer).error for answer in answers] == ["internal error while decoding"] * 3
        assert all_same(tokens(await decode_all(service.coordinators[0], requests)), expected)
    assert "a turn failed" in caplog.text


async def test_a_request_that_takes_too_long_is_ended(trio: Trio) -> None:
    endless = replace(LONG, max_tokens=None)
    async with local_service(trio_config(deadlines={"request_s": 0.3}), trio.engines) as service:
        answer = await decode(service.coordinators[0], request(service.tokenizers, TEXT, sampling=endless))
        assert finished(answer).reason == "error"
        assert "not finished within" in str(finished(answer).error)
