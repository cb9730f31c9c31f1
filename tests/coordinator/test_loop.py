"""The decode loop with three models: concurrent sessions, requests to each role, choices, limits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from actors.api.generation import ROLES, CoordinatorEvent, Delta, Finished, Generate, Rejected, Role
from actors.api.guidance import Guidance
from actors.api.sampling_params import Sampling, Thinking
from actors.config import ServiceConfig
from actors.coordinator.coordinator import Coordinator
from actors.coordinator.loop import LEAD_TOKENS
from actors.engine.interface import BLOCK
from actors.replica.engine_thread import Engine
from tests.support.local_service import WEIGHTS, decode, local_service, trio_config
from tests.support.near_ties import all_same
from tests.support.trio import (
    GREEDY,
    LONG,
    SAMPLED,
    TEXT,
    alone,
    chat_prompts,
    decode_all,
    finished,
    mixed_requests,
    request,
    tokens,
)
from tests.support.watched import Trio, until, watched

NOT_IN_ANY_SLICE = 1_900


@pytest.fixture
def trio(trio_engines: Mapping[Role, Engine]) -> Iterator[Trio]:
    with watched(trio_engines) as trio:
        yield trio


def limited(role: Role, positions: int, **overrides: Any) -> ServiceConfig:
    """A configuration that limits the positions of one role."""
    models: dict[str, dict[str, Any]] = {each: {"path": str(WEIGHTS / each)} for each in ROLES}
    models[role]["max_position"] = positions
    return trio_config(models=models, **overrides)


async def events(coordinator: Coordinator, one: Generate) -> list[CoordinatorEvent]:
    async with aclosing(coordinator.generate(one)) as stream:
        return [event async for event in stream]


# -- concurrent sessions


async def test_sessions_join_at_any_step_and_decode_as_they_do_alone(trio: Trio) -> None:
    async with local_service(trio_config(), trio.engines) as service:
        requests = mixed_requests(service, 12)
        expected = await alone(service, requests)
        begun = trio.watched["target"].forwards

        async def later(step: int, one: Generate) -> list[int]:
            await until(lambda: trio.watched["target"].forwards >= begun + 2 * step)
            return tokens([await decode(service.coordinators[0], one)])[0]

        assert await asyncio.gather(*(later(i, one) for i, one in enumerate(requests))) == expected


async def test_sessions_that_leave_at_any_step_disturb_no_other(trio: Trio) -> None:
    async with local_service(trio_config(), trio.engines) as service:
        requests = mixed_requests(service, 8)
        expected = await alone(service, requests)

        async def leave(after: int) -> None:
            begun = trio.watched["target"].forwards
            one = request(service.tokenizers, TEXT, sampling=LONG, seed=after)
            task = asyncio.create_task(decode(service.coordinators[0], one))
            await until(lambda: trio.watched["target"].forwards >= begun + after)
            task.cancel()
            await asyncio.wait([task])

        leavers = [asyncio.create_task(leave(after)) for after in range(1, 12)]
        assert tokens(await decode_all(service.coordinators[0], requests)) == expected
        await asyncio.gather(*leavers)


async def test_sessions_beyond_the_places_wait_and_change_no_token(trio: Trio) -> None:
    async with local_service(trio_config(), trio.engines) as service:
        requests = mixed_requests(service, 9)
        expected = await alone(service, requests)
    async with local_service(trio_config(coordinator={"max_sessions": 2}), trio.engines) as service:
        answers = await decode_all(service.coordinators[0], requests)
        assert tokens(answers) == expected
        waited = [finished(answer).usage.queued_s for answer in answers]
        assert max(waited) > min(waited) > 0


async def test_choices_share_their_prompts_prefill_and_change_no_token(trio: Trio) -> None:
    async with local_service(trio_config(speculation={"drafts": 0}), trio.engines) as service:
        requests = [request(service.tokenizers, TEXT, sampling=SAMPLED, seed=seed) for seed in range(6)]
        target = service.replicas["target"]
        expected = []
        for one in requests:
            await until(lambda: set(trio.held().values()) == {0})  # nothing is left to fork from
            answer = await decode(service.coordinators[0], one)
            expected += tokens([answer])
            assert finished(answer).usage.cached_tokens == 0
        by_itself = target.stats()
        assert by_itself.forked_tokens == 0
        await until(lambda: set(trio.held().values()) == {0})
        answers = await decode_all(service.coordinators[0], requests)
        assert tokens(answers) == expected
        stats = target.stats()
        shared = (len(requests[0].prompts["target"]) - 1) // BLOCK * BLOCK
        assert sorted(finished(answer).usage.cached_tokens for answer in answers) == [0, *[shared] * 5]
        assert stats.forked_tokens == 5 * shared > 0
        assert stats.tokens - by_itself.tokens == by_itself.tokens - 5 * shared


async def test_two_coordinators_share_the_models(trio: Trio) -> None:
    async with local_service(trio_config(), trio.engines, coordinators=2) as service:
        requests = mixed_requests(service, 10)
        expected = await alone(service, requests)
        answers = await asyncio.gather(*(decode(service.coordinators[i % 2], one) for i, one in enumerate(requests)))
        assert tokens(answers) == expected


async def test_finished_sessions_leave_nothing_in_any_cache(trio: Trio) -> None:
    async with local_service(trio_config(), trio.engines) as service:
        await decode_all(service.coordinators[0], mixed_requests(service, 5))
        await until(lambda: set(trio.held().values()) == {0})
        assert [replica.load().sessions for replica in service.replicas.values()] == [0, 0, 0]
        assert service.coordinators[0].load().sessions == 0


async def test_cancelling_frees_every_cache(trio: Trio) -> None:
    async with local_service(trio_config(), trio.engines) as service:
        coordinator = service.coordinators[0]
        stream = coordinator.generate(request(service.tokenizers, TEXT, sampling=LONG))
        assert isinstance(await anext(stream), Delta)
        assert set(trio.held().values()) == {1}
        await stream.aclose()
        assert coordinator.load().sessions == 0
        await until(lambda: set(trio.held().values()) == {0})
        assert [replica.load().sessions for replica in service.replicas.values()] == [0, 0, 0]


async def test_cancelling_a_request_that_waits_takes_it_out_of_the_queue(trio: Trio) -> None:
    async with local_service(trio_config(coordinator={"max_sessions": 1}), trio.engines) as service:
        coordinator = service.coordinators[0]
        first = coordinator.generate(request(service.tokenizers, TEXT, sampling=LONG))
        await anext(first)
        second = asyncio.create_task(decode(coordinator, request(service.tokenizers, TEXT)))
        await until(lambda: coordinator.load().waiting == 1)
        second.cancel()
        await asyncio.wait([second])
        assert coordinator.load().waiting == 0
        await first.aclose()


# -- requests to each role


async def test_alpha_zero_requests_nothing_from_the_small_models(trio: Trio) -> None:
    async with local_service(trio_config(), trio.engines) as service:
        one = request(service.tokenizers, TEXT, guidance=Guidance(0.0))
        answer = await decode(service.coordinators[0], one)
        assert finished(answer).usage.guided_tokens == 0
        assert trio.extended() == {"target": len(answer.tokens), "guider": 0, "guider_base": 0}


async def test_the_small_models_read_ahead_shortly_before_guidance_starts(trio: Trio) -> None:
    async with local_service(trio_config(speculation={"drafts": 0}), trio.engines) as service:
        warmup = LEAD_TOKENS + 6
        one = request(service.tokenizers, TEXT, guidance=Guidance(1.0, warmup_tokens=warmup), sampling=LONG)
        one = replace(one, sampling=replace(LONG, max_tokens=warmup + 4))
        answer = await decode(service.coordinators[0], one)
        assert len(answer.tokens) == warmup + 4
        for role in ("guider", "guider_base"):
            extends = trio.watched[role].extends
            first, *others = [extend for extend in extends if extend.rows]
            before = [extend for extend in extends if not extend.rows]
            assert (before[0].position, before[0].end) == (0, len(one.prompts["target"]) + 6)
            assert sum(len(extend.tokens) for extend in extends) == len(one.prompts["target"]) + warmup + 3
            assert len(first.tokens) == 1 or first.position >= before[0].end
            assert [len(extend.tokens) for extend in others] == [1, 1, 1]
        assert finished(answer).usage.guided_tokens == 4


@pytest.mark.parametrize("mode", ["topk", "full"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
async def test_where_guidance_ends_the_target_goes_on_alone(trio: Trio, sampling: Sampling, mode: str) -> None:
    exchange = {"mode": mode, "max_unseen_mass": 1.0}
    async with local_service(trio_config(deadlines={"step_s": 5}, exchange=exchange), trio.engines) as service:
        guided = request(service.tokenizers, TEXT, sampling=sampling, guidance=Guidance(1.0, schedule=((5, 0.0),)))
        answer = await decode(service.coordinators[0], guided)
        begun = answer.tokens[:5]
        assert finished(answer).usage.guided_tokens == 5
        assert finished(answer).usage.widened_rows == 0
        prompt: dict[Role, list[int]] = {"target": [*guided.prompts["target"], *begun]}
        rest = replace(sampling, max_tokens=int(sampling.max_tokens or 0) - 5)
        unguided = await decode(
            service.coordinators[0], replace(guided, prompts=prompt, sampling=rest, guidance=Guidance(0.0))
        )
        assert answer.tokens == begun + unguided.tokens


async def test_guidance_of_the_thinking_ends_with_it(trio: Trio) -> None:
    async with local_service(trio_config(deadlines={"step_s": 5}), trio.engines) as service:
        thinking = Thinking(start="<think>")
        one = request(service.tokenizers, TEXT, thinking=thinking, guidance=Guidance(1.0, guide="thinking"))
        end = finished(await decode(service.coordinators[0], one))
        assert end.reason == "stop"
        assert end.usage.guided_tokens == end.usage.reasoning_tokens > 0


@pytest.mark.parametrize("role", ["guider", "guider_base"])
async def test_a_small_model_is_served_alone(trio: Trio, role: Role) -> None:
    async with local_service(trio_config(), trio.engines) as service:
        answer = await decode(service.coordinators[0], request(service.tokenizers, TEXT, primary=role))
        tokens([answer])
        assert {asked for asked, count in trio.extended().items() if count} == {role}
        assert finished(answer).usage.changed_tokens == 0


# -- what is chosen


@pytest.mark.parametrize("mode", ["topk", "full"])
async def test_a_bias_chooses_an_id_that_is_in_no_slice(trio: Trio, mode: str) -> None:
    exchange = {"mode": mode, "k": 4, "max_unseen_mass": 1.0}
    async with local_service(trio_config(exchange=exchange), trio.engines) as service:
        sampling = Sampling(temperature=0, max_tokens=3, logit_bias=((NOT_IN_ANY_SLICE, 100.0),))
        for alpha in (0.0, 1.0):
            one = request(service.tokenizers, TEXT, sampling=sampling, guidance=Guidance(alpha))
            assert (await decode(service.coordinators[0], one)).tokens == [NOT_IN_ANY_SLICE] * 3


async def test_bans_beyond_the_slice_widen_the_row(trio: Trio) -> None:
    async with local_service(trio_config(exchange={"k": 1, "max_unseen_mass": 1.0}), trio.engines) as service:
        first = (await decode(service.coordinators[0], request(service.tokenizers, TEXT))).tokens[0]
        sampling = Sampling(temperature=0, max_tokens=1, stop_token_ids=(first,), min_tokens=1)
        one = request(service.tokenizers, TEXT, sampling=sampling, guidance=Guidance(0.0))
        answer = await decode(service.coordinators[0], one)
        assert answer.tokens != [first]
        assert finished(answer).reason == "length"


async def test_audits_come_by_the_count_and_change_no_token(trio: Trio) -> None:
    async with local_service(trio_config(exchange={"audit_every": 0}), trio.engines) as service:
        requests = [request(service.tokenizers, text, seed=i) for i, text in enumerate(chat_prompts(4))]
        expected = tokens(await decode_all(service.coordinators[0], requests))
        assert service.coordinators[0].measured().counter("thinklogit_audited_rows").value == 0
    async with local_service(trio_config(exchange={"audit_every": 5, "max_unseen_mass": 1.0}), trio.engines) as service:
        assert all_same(tokens(await decode_all(service.coordinators[0], requests)), expected)
        loop = service.coordinators[0]._loop
        audited_rows = loop.meter.audited_rows.value
        assert audited_rows == loop.meter.guided_rows.value // 5 > 0
        assert loop.meter.audits_differing.value == 0
        assert 0 <= loop._verifier.audited_variation / audited_rows < 0.01


async def test_notes_explain_every_token(trio: Trio) -> None:
    async with local_service(trio_config(), trio.engines) as service:
        guidance = Guidance(1.0, warmup_tokens=2)
        one = request(service.tokenizers, TEXT, explain=True, guidance=guidance)
        seen = await events(service.coordinators[0], one)
        deltas = [event for event in seen if isinstance(event, Delta)]
        notes = [note for delta in deltas for note in delta.notes]
        end = seen[-1]
        assert isinstance(end, Finished)
        assert [note.id for note in notes] == [token for delta in deltas for token in delta.tokens]
        assert [note.alpha for note in notes[:3]] == [0, 0, 1]
        assert sum(note.changed for note in notes) == end.usage.changed_tokens
        assert "".join(note.text for note in notes) == "".join(delta.content for delta in deltas)


# -- limits


async def test_an_answer_ends_at_max_tokens(trio: Trio) -> None:
    async with local_service(trio_config(), trio.engines) as service:
        answer = await decode(
            service.coordinators[0], request(service.tokenizers, TEXT, sampling=replace(LONG, max_tokens=7))
        )
        assert len(answer.tokens) == 7
        assert finished(answer).reason == "length"


async def test_more_than_the_queue_holds_is_refused(trio: Trio) -> None:
    async with local_service(trio_config(coordinator={"max_sessions": 1, "max_waiting": 1}), trio.engines) as service:
        coordinator = service.coordinators[0]
        first = coordinator.generate(request(service.tokenizers, TEXT, sampling=LONG))
        await anext(first)
        second = asyncio.create_task(decode(coordinator, request(service.tokenizers, TEXT)))
        await until(lambda: coordinator.load().waiting == 1)
        (refused,) = await events(coordinator, request(service.tokenizers, TEXT))
        assert isinstance(refused, Rejected)
        assert refused.code == "overloaded"
        assert refused.retry_after_s
        await first.aclose()
        assert finished(await second).reason == "stop"


async def test_a_burst_beyond_the_queue_is_refused_too(trio: Trio) -> None:
    async with local_service(trio_config(coordinator={"max_sessions": 2, "max_waiting": 1}), trio.engines) as service:
        requests = [request(service.tokenizers, TEXT, seed=i) for i in range(5)]
        answers = await decode_all(service.coordinators[0], requests)
        assert sum(isinstance(answer.end, Rejected) for answer in answers) == 2


@pytest.mark.parametrize(
    "sampling",
    [Sampling(logit_bias=((5_000, 1.0),)), Sampling(stop_token_ids=(-1,)), Sampling(logit_bias=((-1, 1.0),))],
)
async def test_ids_that_do_not_exist_are_refused(trio: Trio, sampling: Sampling) -> None:
    async with local_service(trio_config(), trio.engines) as service:
        (refused,) = await events(service.coordinators[0], request(service.tokenizers, TEXT, sampling=sampling))
        assert isinstance(refused, Rejected)
        assert refused.code == "invalid"


async def test_an_empty_prompt_is_refused(trio: Trio) -> None:
    async with local_service(trio_config(), trio.engines) as service:
        (refused,) = await events(service.coordinators[0], request(service.tokenizers, "", chat=False))
        assert isinstance(refused, Rejected)


async def test_an_answer_ends_where_the_targets_positions_do(trio: Trio) -> None:
    async with local_service(limited("target", 40), trio.engines) as service:
        one = request(service.tokenizers, TEXT, sampling=LONG)
        answer = await decode(service.coordinators[0], one)
        assert finished(answer).reason == "length"
        assert len(one.prompts["target"]) + len(answer.tokens) == 40


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("rule", ["error", "stop_guidance"])
async def test_a_prompt_beyond_the_context_ends_at_once(trio: Trio, rule: str, alpha: float) -> None:
    async with local_service(limited("target", 16, beyond_context=rule), trio.engines) as service:
        one = request(service.tokenizers, TEXT, guidance=Guidance(alpha))
        answer = await decode(service.coordinators[0], one)
        assert answer.tokens == []
        assert finished(answer).reason == "length"


@pytest.mark.parametrize("rule", ["error", "stop_guidance"])
async def test_a_small_models_last_position_ends_guidance_or_the_answer(trio: Trio, rule: str) -> None:
    async with local_service(limited("guider_base", 40, beyond_context=rule), trio.engines) as service:
        one = request(service.tokenizers, TEXT, sampling=replace(LONG, max_tokens=30))
        room = 40 - len(one.prompts["guider_base"]) + 1  # the row of the last position still gives a token
        answer = await decode(service.coordinators[0], one)
        assert finished(answer).reason == "length"
        assert len(answer.tokens) == (room if rule == "error" else 30)
        assert finished(answer).usage.guided_tokens == room


async def test_guidance_by_a_role_without_a_prompt_fails_alone(trio: Trio) -> None:
    async with local_service(trio_config(), trio.engines) as service:
        one = request(service.tokenizers, TEXT, roles=("target",))
        other = request(service.tokenizers, TEXT)
        answers = await decode_all(service.coordinators[0], [other, one])
        assert finished(answers[0]).reason == "stop"
        assert isinstance(answers[1].end, Rejected) or finished(answers[1]).reason == "error"
