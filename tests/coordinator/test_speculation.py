"""Drafts change no token: answers with and without them are identical under all circumstances."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from actors.api.generation import ROLES, Generate, Role
from actors.api.guidance import Guidance
from actors.api.sampling_params import Sampling, Thinking
from actors.config import ServiceConfig
from actors.replica.engine_thread import Engine
from tests.support.deadlines import HANG_S
from tests.support.local_service import WEIGHTS, LocalService, decode, local_service, trio_config
from tests.support.near_ties import all_same, same
from tests.support.tiers import slow
from tests.support.trio import LONG, TEXT, chat_prompts, decode_all, finished, request, tokens
from tests.support.watched import Trio, WatchedEngine, until, watched

LENGTHS = (1, slow(2), slow(3), 4, slow(5), slow(6), slow(7), 8)
SAMPLINGS = (
    Sampling(temperature=0, max_tokens=32),
    Sampling(temperature=0.6, top_p=0.95, max_tokens=32),
    Sampling(temperature=1.0, max_tokens=32),
)
RAW = ("Once upon a time", "1, 2, 3, 1, 2, 3, 1,", "Ünïcödé and 漢字", "Who", "def main():\n    ")


@pytest.fixture
def trio(trio_engines: Mapping[Role, Engine]) -> Iterator[Trio]:
    with watched(trio_engines) as trio:
        yield trio


def drafting(**overrides: Any) -> ServiceConfig:
    """A configuration that always drafts as many tokens as requested, with room for all sessions at once."""
    places = {"max_sessions": 600, "max_waiting": 600}
    return trio_config(speculation={"drafts": 8, "adapt": False}, coordinator=places, **overrides)


def with_drafts(requests: list[Generate], drafts: int | None = None) -> list[Generate]:
    """Requests with so many drafts, or with every length in turn."""
    return [replace(one, drafts=i % 8 + 1 if drafts is None else drafts) for i, one in enumerate(requests)]


async def answers(service: LocalService, requests: list[Generate]) -> list[list[int]]:
    return tokens(await decode_all(service.coordinators[0], requests))


def varied_requests(service: LocalService, prompts: int = 200) -> list[Generate]:
    """Requests for questions and raw text with every way of sampling."""
    texts = [(text, True) for hops in (2, 3) for text in chat_prompts(prompts * 2 // 5, hops)]
    texts += [(f"{RAW[i % len(RAW)]} {i}", False) for i in range(prompts // 5)]
    requests = [
        request(service.tokenizers, text, sampling=sampling, seed=1_000 * way + i, chat=chat)
        for way, sampling in enumerate(SAMPLINGS)
        for i, (text, chat) in enumerate(texts)
    ]
    random.Random(1).shuffle(requests)
    return requests


@pytest.mark.parametrize("prompts", [20, slow(200)])
async def test_speculation_changes_no_token(trio_engines: Mapping[Role, Engine], prompts: int) -> None:
    """Draft lengths 1 to 8, prompts x 3 ways of sampling, compared with no drafts."""
    async with local_service(drafting(), trio_engines) as service:
        requests = varied_requests(service, prompts)
        expected = await answers(service, with_drafts(requests, 0))
        decoded = await decode_all(service.coordinators[0], with_drafts(requests))
        assert all_same(tokens(decoded), expected)
        drafted = sum(finished(answer).usage.drafted_tokens for answer in decoded)
        kept = sum(finished(answer).usage.accepted_tokens for answer in decoded)
        total = sum(len(answer) for answer in expected)
        assert 0.2 * total < kept < drafted  # most answers are short, and some drafts are rejected
        print(f"{kept} of {drafted} drafts were kept, {total} tokens")  # shown with -rP


@pytest.mark.parametrize("length", LENGTHS)
async def test_every_draft_length_gives_the_same_tokens_alone(trio: Trio, length: int) -> None:
    async with local_service(drafting(), trio.engines) as service:
        for sampling in SAMPLINGS:
            one = request(service.tokenizers, TEXT, sampling=replace(sampling, ignore_eos=True, max_tokens=40))
            (expected,) = await answers(service, [replace(one, drafts=0)])
            begun = trio.watched["target"].forwards
            answer = await decode(service.coordinators[0], replace(one, drafts=length))
            usage = finished(answer).usage
            assert same(answer.tokens, expected)
            assert usage.accepted_tokens > 0
            assert trio.watched["target"].forwards - begun == 40 - usage.accepted_tokens


# -- whatever depends on the tokens so far

HISTORIES: dict[str, dict[str, Any]] = {
    "penalties": {"sampling": replace(LONG, max_tokens=40, frequency_penalty=0.7, repetition_penalty=1.2)},
    "a bias": {"sampling": replace(LONG, max_tokens=30, logit_bias=((300, 4.0), (17, -3.0)))},
    "lifted words": {"sampling": replace(LONG, max_tokens=30, presence_penalty=-0.8)},
    "min_tokens": {"sampling": Sampling(temperature=0.9, max_tokens=40, min_tokens=25)},
    "a stop text": {"sampling": Sampling(temperature=0, max_tokens=60, stop=(" of ",))},
    "repeats": {"sampling": Sampling(temperature=0, max_tokens=60, ignore_eos=True, stop_on_repeat=3)},
    "a schedule": {"sampling": replace(LONG, max_tokens=30), "guidance": Guidance(1, schedule=((7, 0), (13, 0.5)))},
    "warm-up": {"sampling": replace(LONG, max_tokens=30), "guidance": Guidance(1, warmup_tokens=9)},
    "the end of thinking": {"guidance": Guidance(1, guide="thinking"), "thinking": Thinking(start="<think>")},
    "a thinking budget": {"thinking": Thinking(start="<think>", max_tokens=7)},
    "a closing text": {"thinking": Thinking(start="<think>", max_tokens=7, closing="\n\nI must answer now.\n")},
    "forced thinking": {"thinking": Thinking(start="<think>", min_tokens=20), "sampling": replace(LONG, max_tokens=60)},
    "explanations": {"explain": True, "sampling": replace(LONG, max_tokens=30)},
}


@pytest.mark.parametrize("kind", HISTORIES)
@pytest.mark.parametrize("exchange", [{}, slow({"k": 4}), slow({"mode": "full"}), slow({"audit_every": 3})])
async def test_rows_that_depend_on_earlier_tokens_are_decided_one_by_one(
    trio: Trio, kind: str, exchange: dict[str, Any]
) -> None:
    async with local_service(drafting(exchange=exchange), trio.engines) as service:
        requests = [
            request(service.tokenizers, text, seed=i, **HISTORIES[kind]) for i, text in enumerate(chat_prompts(4))
        ]
        expected = await answers(service, with_drafts(requests, 0))
        assert all_same(await answers(service, with_drafts(requests, 5)), expected)


async def test_notes_and_counts_are_those_without_drafts(trio: Trio) -> None:
    async with local_service(drafting(), trio.engines) as service:
        one = request(service.tokenizers, TEXT, sampling=replace(LONG, max_tokens=40), seed=3)
        plain = finished(await decode(service.coordinators[0], replace(one, drafts=0))).usage
        drafted = finished(await decode(service.coordinators[0], replace(one, drafts=6))).usage
        assert (plain.drafted_tokens, plain.accepted_tokens) == (0, 0)
        assert drafted.drafted_tokens >= drafted.accepted_tokens > 0
        assert replace(drafted, drafted_tokens=0, accepted_tokens=0) == plain


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("rule", ["error", "stop_guidance"])
async def test_the_last_position_of_a_model_ends_the_same_answer(trio: Trio, role: Role, rule: str) -> None:
    models: dict[str, dict[str, Any]] = {each: {"path": str(WEIGHTS / each)} for each in ROLES}
    models[role]["max_position"] = 40
    async with local_service(drafting(models=models, beyond_context=rule), trio.engines) as service:
        one = request(service.tokenizers, TEXT, sampling=replace(LONG, max_tokens=40))
        (expected,) = await answers(service, [replace(one, drafts=0)])
        for drafts in (3, 8):
            assert all_same(await answers(service, [replace(one, drafts=drafts)]), [expected])


# -- sources of drafts


async def test_without_guidance_the_sessions_own_text_drafts(trio: Trio) -> None:
    async with local_service(drafting(), trio.engines) as service:
        repeats = " ".join(["Ada met the doctor of Bo."] * 6)
        one = request(
            service.tokenizers, repeats, sampling=replace(LONG, temperature=0, max_tokens=60), guidance=Guidance(0.0)
        )
        (expected,) = await answers(service, [replace(one, drafts=0)])
        answer = await decode(service.coordinators[0], replace(one, drafts=4))
        assert same(answer.tokens, expected)
        assert finished(answer).usage.accepted_tokens > 0
        assert trio.extended()["guider"] == 0


async def test_the_guider_can_draft_for_the_target_alone(trio: Trio) -> None:
    async with local_service(drafting(), trio.engines) as service:
        one = request(service.tokenizers, TEXT, sampling=replace(LONG, max_tokens=60), guidance=Guidance(0.0))
        (expected,) = await answers(service, [replace(one, drafts=0)])
        answer = await decode(service.coordinators[0], replace(one, drafts=3, drafter="guider"))
        assert same(answer.tokens, expected)
        assert finished(answer).usage.accepted_tokens > 0
        assert finished(answer).usage.guided_tokens == 0
        assert trio.extended()["guider"] > 0
        assert trio.extended()["guider_base"] == 0


@pytest.mark.parametrize("role", ["guider", "guider_base"])
async def test_a_small_model_alone_is_drafted_for_by_its_text(trio: Trio, role: Role) -> None:
    async with local_service(drafting(), trio.engines) as service:
        one = request(service.tokenizers, TEXT, primary=role, sampling=replace(LONG, max_tokens=60))
        (expected,) = await answers(service, [replace(one, drafts=0)])
        assert all_same(await answers(service, [replace(one, drafts=4)]), [expected])


async def test_a_request_and_the_configuration_can_each_switch_drafts_off(trio: Trio) -> None:
    one: Generate
    async with local_service(drafting(), trio.engines) as service:
        one = request(service.tokenizers, TEXT)
        off = finished(await decode(service.coordinators[0], replace(one, drafts=0)))
        assert off.usage.drafted_tokens == 0
    async with local_service(trio_config(speculation={"drafts": 0}), trio.engines) as service:
        off = finished(await decode(service.coordinators[0], replace(one, drafts=8)))
        assert off.usage.drafted_tokens == 0


async def test_drafts_adapt_and_change_no_token(trio: Trio) -> None:
    async with local_service(drafting(), trio.engines) as service:
        requests = varied_requests(service)[:60]
        expected = await answers(service, with_drafts(requests, 0))
    async with local_service(trio_config(coordinator={"max_sessions": 60}), trio.engines) as service:
        assert all_same(await answers(service, requests), expected)


# -- whatever goes wrong


@pytest.mark.parametrize("role", ROLES)
async def test_caches_lost_while_drafts_are_checked_change_no_token(trio: Trio, role: Role) -> None:
    def act(engine: WatchedEngine) -> None:
        if engine.forwards % 4 == 0:
            engine.forget_everything()

    async with local_service(drafting(), trio.engines) as service:
        requests = varied_requests(service)[:12]
        expected = await answers(service, with_drafts(requests, 0))
        trio.disturb(act, role)
        assert all_same(await answers(service, with_drafts(requests)), expected)


@pytest.mark.parametrize("role", ROLES)
async def test_forwards_that_fail_while_drafts_are_checked_change_no_token(trio: Trio, role: Role) -> None:
    def fail(engine: WatchedEngine) -> None:
        if engine.forwards % 5 == 3:
            raise RuntimeError("a fault in the middle")

    async with local_service(drafting(), trio.engines) as service:
        requests = varied_requests(service)[:12]
        expected = await answers(service, with_drafts(requests, 0))
        trio.disturb(fail, role)
        assert all_same(await answers(service, with_drafts(requests)), expected)


@pytest.mark.parametrize("role", [slow("target"), "guider", slow("guider_base")])
async def test_a_replica_lost_while_drafts_are_checked_changes_no_token(trio: Trio, role: Role) -> None:
    async with local_service(drafting(), trio.engines) as service:
        requests = [
            replace(one, sampling=replace(LONG, max_tokens=120), drafts=4) for one in varied_requests(service)[:4]
        ]
        expected = await answers(service, with_drafts(requests, 0))
        stop_at = trio.watched[role].forwards + 15
        going = asyncio.ensure_future(answers(service, requests))
        await until(lambda: trio.watched[role].forwards >= stop_at)
        await service.replicas[role].stop()
        await service.start_replica(role)
        assert all_same(await asyncio.wait_for(going, HANG_S), expected)


async def test_drafts_leave_nothing_in_any_cache(trio: Trio) -> None:
    async with local_service(drafting(), trio.engines) as service:
        await decode_all(service.coordinators[0], with_drafts(varied_requests(service)[:10]))
        await until(lambda: set(trio.held().values()) == {0})
        assert service.coordinators[0].load().sessions == 0
