"""Answers that obey a grammar: token for token the same, whatever else happens."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from llguidance import LLMatcher, LLParserLimits

from actors.api.generation import ROLES, Delta, Finished, Generate, Rejected, Resume, Role
from actors.api.sampling_params import Sampling
from actors.coordinator import loop as loop_module
from actors.decoding import grammar as grammar_module
from actors.decoding.grammar import GrammarMatcher, fill_masks
from actors.replica.engine_thread import Engine
from tests.coordinator.test_speculation import drafting
from tests.support.local_service import LocalService, decode, local_service, trio_config
from tests.support.tiers import slow
from tests.support.trio import TEXT, decode_all, request, tokens
from tests.support.watched import Trio, WatchedEngine, until, watched

SCHEMA = {
    "type": "object",
    "properties": {
        "person": {"type": "string", "pattern": "^[A-Z][a-z]{1,8}$"},
        "hops": {"type": "integer", "minimum": 1, "maximum": 9},
        "tags": {"type": "array", "items": {"enum": ["near", "far"]}, "maxItems": 2},
    },
    "required": ["person", "hops", "tags"],
    "additionalProperties": False,
}
GRAMMAR = LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_flexible": False})


def asked(service: LocalService, count: int = 6, **changes: Any) -> list[Generate]:
    """Requests that must answer in JSON, greedy and sampled in turn."""
    samplings = [Sampling(temperature=0, max_tokens=200), Sampling(temperature=1, max_tokens=200)]
    plain = [request(service.tokenizers, TEXT, sampling=samplings[number % 2], seed=number) for number in range(count)]
    return [replace(one, **{"grammar": GRAMMAR} | changes) for one in plain]


def obeys(content: str) -> bool:
    value = json.loads(content)
    assert list(value) == ["person", "hops", "tags"]
    assert re.fullmatch("[A-Z][a-z]{1,8}", value["person"])
    assert value["hops"] in range(1, 10)
    return len(value["tags"]) <= 2 and set(value["tags"]) <= {"near", "far"}


async def test_every_answer_obeys_and_drafts_and_company_change_no_token(trio_engines: Mapping[Role, Engine]) -> None:
    async with local_service(drafting(), trio_engines) as service:
        coordinator = service.coordinators[0]
        alone = [await decode(coordinator, one) for one in asked(service, drafts=0)]
        for answer in alone:
            assert isinstance(answer.end, Finished)
            assert answer.end.reason == "stop"
            assert obeys(answer.content)
        assert len({answer.content for answer in alone}) > 2
        expected = tokens(alone)
        for drafts in (0, 1, 5):
            assert tokens(await decode_all(coordinator, asked(service, drafts=drafts))) == expected


async def test_another_coordinator_goes_on_in_the_middle_of_a_grammar(trio_engines: Mapping[Role, Engine]) -> None:
    async with local_service(drafting(), trio_engines) as service:
        for one in asked(service, 2):
            whole = (await decode(service.coordinators[0], one)).tokens
            for kept in (1, 4, len(whole) - 1):
                rest = await decode(service.coordinators[0], replace(one, resume=Resume(whole[:kept])))
                assert rest.tokens == whole[kept:]


async def test_a_grammar_begins_after_the_thinking(trio_engines: Mapping[Role, Engine]) -> None:
    async with local_service(drafting(), trio_engines) as service:
        for one in asked(service, 4):
            thinking = replace(one.thinking, start="<think>", end="</think>", max_tokens=12)
            prompts = {role: [*ids, *service.tokenizers[role].encode("<think>")] for role, ids in one.prompts.items()}
            answers = [
                await decode(service.coordinators[0], replace(one, thinking=thinking, prompts=prompts, drafts=drafts))
                for drafts in (0, 4)
            ]
            assert answers[0].tokens == answers[1].tokens
            assert answers[0].reasoning
            assert obeys(answers[0].content.strip())


async def test_an_end_within_the_thinking_ends_the_thinking_alone(trio_engines: Mapping[Role, Engine]) -> None:
    async with local_service(drafting(), trio_engines) as service:
        end = service.tokenizers["target"].eos_ids[0]
        for one in asked(service, 2):
            thinking = replace(one.thinking, start="<think>", end="</think>")
            eager = replace(one.sampling, logit_bias=((end, 100.0),))
            prompts = {role: [*ids, *service.tokenizers[role].encode("<think>")] for role, ids in one.prompts.items()}
            answers = [
                await decode(
                    service.coordinators[0],
                    replace(one, thinking=thinking, prompts=prompts, sampling=eager, drafts=drafts),
                )
                for drafts in (0, 4)
            ]
            assert answers[0].tokens == answers[1].tokens
            assert obeys(answers[0].content)
            ended = await decode(
                service.coordinators[0],
                replace(one, thinking=thinking, prompts=prompts, sampling=eager, grammar=""),
            )
            assert ended.content == ""


async def test_a_coordinator_says_that_it_has_begun_before_it_compiles_a_grammar(
    trio_engines: Mapping[Role, Engine],
) -> None:
    """A crash of the compiler must count against the request."""
    async with local_service(drafting(), trio_engines) as service:
        (one,) = asked(service, 1)
        async with aclosing(service.coordinators[0].generate(replace(one, grammar="start: ("))) as events:
            assert await anext(events) == Delta()
            assert isinstance(await anext(events), Rejected)


async def test_a_grammar_that_is_not_one_is_rejected(trio_engines: Mapping[Role, Engine]) -> None:
    async with local_service(drafting(), trio_engines) as service:
        (one,) = asked(service, 1)
        answer = await decode(service.coordinators[0], replace(one, grammar="start: ("))
        assert getattr(answer.end, "code", None) == "invalid"


@pytest.mark.parametrize("more", [{"min_tokens": 60}, {"ignore_eos": True}])
async def test_an_answer_ends_where_its_grammar_ends(trio_engines: Mapping[Role, Engine], more: dict[str, Any]) -> None:
    """A minimal length cannot be reached where nothing but the end is legal."""
    grammar = LLMatcher.grammar_from_lark('start: "yes" | "no"')
    async with local_service(drafting(), trio_engines) as service:
        for one in asked(service, 2, grammar=grammar):
            answer = await decode(service.coordinators[0], replace(one, sampling=replace(one.sampling, **more)))
            assert isinstance(answer.end, Finished)
            assert answer.end.reason == "stop"
            assert answer.content in ("yes", "no")


async def test_drafted_ends_change_no_token_where_ends_are_ignored(trio_engines: Mapping[Role, Engine]) -> None:
    grammar = LLMatcher.grammar_from_regex("[0-9]+")
    async with local_service(drafting(), trio_engines) as service:
        end = service.tokenizers["target"].eos_ids[0]
        sampling = Sampling(temperature=1, max_tokens=30, ignore_eos=True, logit_bias=((end, 6.0),))
        requests = [replace(one, sampling=sampling) for one in asked(service, 6, grammar=grammar)]
        plain = tokens(await decode_all(service.coordinators[0], [replace(one, drafts=0) for one in requests]))
        assert any(end in each for each in plain)
        assert tokens(await decode_all(service.coordinators[0], [replace(one, drafts=5) for one in requests])) == plain


@pytest.mark.parametrize("alpha", [0.0, 1.5])
async def test_choices_hold_with_and_without_guidance(trio_engines: Mapping[Role, Engine], alpha: float) -> None:
    grammar = LLMatcher.grammar_from_lark('start: "yes" | "no" | "maybe not"')
    async with local_service(drafting(), trio_engines) as service:
        for one in asked(service, 4):
            guided = replace(one, grammar=grammar, guidance=replace(one.guidance, alpha=alpha))
            assert (await decode(service.coordinators[0], guided)).content in ("yes", "no", "maybe not")


async def test_legal_ids_that_no_slice_holds_are_looked_up_and_decide_as_whole_rows(
    trio_engines: Mapping[Role, Engine],
) -> None:
    """A slice of 2 ids seldom holds a legal one; whole rows hold all of them."""
    async with local_service(drafting(exchange={"mode": "full"}), trio_engines) as service:
        expected = tokens(await decode_all(service.coordinators[0], asked(service, drafts=0)))
    narrow = drafting(exchange={"k": 2, "max_unseen_mass": 1e-9})
    for mixed in (0, 3):
        async with local_service(narrow, trio_engines) as service:
            answers = await decode_all(service.coordinators[0], asked(service, drafts=mixed))
            assert tokens(answers) == expected
            widened = [answer.end.usage.widened_rows for answer in answers if isinstance(answer.end, Finished)]
            assert min(widened) > 2


async def test_few_legal_ids_cost_no_whole_row(trio_engines: Mapping[Role, Engine]) -> None:
    grammar = LLMatcher.grammar_from_regex("[0-9]{8}")
    async with local_service(drafting(exchange={"k": 2, "max_unseen_mass": 1e-9}), trio_engines) as service:
        before = [model.stats().bytes_sent for model in service.replicas.values()]
        answers = await decode_all(service.coordinators[0], [replace(one, grammar=grammar) for one in asked(service)])
        sent = [model.stats().bytes_sent - old for model, old in zip(service.replicas.values(), before, strict=True)]
    written = sum(len(answer.tokens) for answer in answers)
    assert all(re.fullmatch("[0-9]{8}", answer.content) for answer in answers)
    assert max(sent) / written < 2_000  # a whole row alone takes 2,048 logits of 4 bytes


async def test_tokens_that_a_grammar_forces_are_drafted(trio_engines: Mapping[Role, Engine]) -> None:
    async with local_service(
        trio_config(speculation={"drafts": 5, "lookup": False, "adapt": False}), trio_engines
    ) as service:
        for one in asked(service, 2):
            alone = replace(one, guidance=replace(one.guidance, alpha=0.0), prompts={"target": one.prompts["target"]})
            drafted = await decode(service.coordinators[0], alone)
            plain = await decode(service.coordinators[0], replace(alone, drafts=0))
            assert drafted.tokens == plain.tokens
            assert isinstance(drafted.end, Finished)
            assert drafted.end.usage.accepted_tokens > 0


async def test_no_illegal_draft_is_verified(
    trio_engines: Mapping[Role, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guider drafts without a mask, so many of its drafts are illegal."""
    verified: list[tuple[int, int]] = []  # by window its legal drafts, and all of them

    def watched_fill(wanted: Sequence[tuple[GrammarMatcher, Sequence[int]]]) -> None:
        verified.extend((grammar.legal_length(drafts), len(drafts)) for grammar, drafts in wanted)
        fill_masks(wanted)

    monkeypatch.setattr(loop_module, "fill_masks", watched_fill)
    async with local_service(drafting(), trio_engines) as service:
        tokens(await decode_all(service.coordinators[0], asked(service, drafts=5)))
    assert any(drafts for _, drafts in verified)
    assert all(legal == drafts for legal, drafts in verified)


async def test_a_grammar_that_is_given_up_ends_the_answer_with_an_error_that_names_it(
    trio_engines: Mapping[Role, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_module, "LIMITS", LLParserLimits(step_max_items=5, verbose_errors=False))
    grammar = LLMatcher.grammar_from_lark('start: ("a" | "b" start "c" | start "d")+')
    async with local_service(drafting(), trio_engines) as service:
        for one in asked(service, 2):
            answer = await decode(service.coordinators[0], replace(one, grammar=grammar))
            assert isinstance(answer.end, Finished)
            assert answer.end.reason == "error"
            assert "grammar was given up" in (answer.end.error or "")


@pytest.mark.parametrize("mode", ["topk", "full"])
async def test_a_ban_of_all_that_a_grammar_allows_is_an_error(trio_engines: Mapping[Role, Engine], mode: str) -> None:
    grammar = LLMatcher.grammar_from_lark('start: "x"')
    async with local_service(drafting(exchange={"mode": mode}), trio_engines) as service:
        (one,) = asked(service, 1)
        banned = service.tokenizers["target"].encode_continuation("x")
        sampling = replace(one.sampling, bad_words=tuple((id_,) for id_ in banned))
        for wanted in (None, 20):  # with log-probabilities more candidates are known
            barred = replace(one, grammar=grammar, sampling=sampling, logprobs=wanted)
            answer = await decode(service.coordinators[0], barred)
            assert isinstance(answer.end, Finished)
            assert answer.end.reason == "error"
            assert "no token to choose" in (answer.end.error or "")


async def test_sixteen_sessions_decode_as_one_alone(trio_engines: Mapping[Role, Engine]) -> None:
    async with local_service(drafting(), trio_engines) as service:
        coordinator = service.coordinators[0]
        alone = tokens([await decode(coordinator, one) for one in asked(service, 4)])
        beside = [replace(one, grammar="", seed=one.seed + 100) for one in asked(service, 6)]
        for drafts in (0, 5):
            together = await decode_all(coordinator, [*asked(service, 4, drafts=drafts), *asked(service, 6), *beside])
            assert tokens(together)[:4] == alone


@pytest.fixture
def trio(trio_engines: Mapping[Role, Engine]) -> Iterator[Trio]:
    with watched(trio_engines) as trio:
        yield trio


@pytest.mark.parametrize("role", ROLES)
async def test_a_replica_that_dies_in_a_grammar_changes_no_token(trio: Trio, role: Role) -> None:
    async with local_service(drafting(), trio.engines) as service:
        requests = asked(service, 4)
        expected = tokens([await decode(service.coordinators[0], one) for one in requests])
        begun = service.coordinators[0].load().tokens
        running = asyncio.create_task(decode_all(service.coordinators[0], requests))
        await until(lambda: service.coordinators[0].load().tokens >= begun + 20)
        await service.replicas[role].stop()
        await asyncio.to_thread(service.replicas[role]._thread._thread.join, 10)
        trio.watched[role].clear()
        await service.start_replica(role)
        assert tokens(await running) == expected


@pytest.mark.parametrize("role", ["target", slow("guider"), slow("guider_base")])
async def test_a_cache_that_is_lost_in_a_grammar_changes_no_token(trio: Trio, role: Role) -> None:
    async with local_service(drafting(), trio.engines) as service:
        requests = asked(service, 4)
        expected = tokens([await decode(service.coordinators[0], one) for one in requests])

        def forget(engine: WatchedEngine) -> None:
            if engine.forwards % 3 == 0:
                engine.forget_everything()

        trio.disturb(forget, role)
        assert tokens(await decode_all(service.coordinators[0], requests)) == expected
