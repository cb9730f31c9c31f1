"""Answers that obey a grammar: token for token the same, whatever else happens."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from llguidance import LLMatcher

from actors.api.generation import Finished, Generate, Resume, Role
from actors.api.sampling_params import Sampling
from actors.replica.engine_thread import Engine
from tests.coordinator.test_speculation import drafting
from tests.support.local_service import LocalService, decode, local_service
from tests.support.trio import TEXT, decode_all, request, tokens

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
    return [replace(one, grammar=GRAMMAR, **changes) for one in plain]


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


async def test_a_grammar_that_is_not_one_is_rejected(trio_engines: Mapping[Role, Engine]) -> None:
    async with local_service(drafting(), trio_engines) as service:
        (one,) = asked(service, 1)
        answer = await decode(service.coordinators[0], replace(one, grammar="start: ("))
        assert getattr(answer.end, "code", None) == "invalid"


@pytest.mark.parametrize("alpha", [0.0, 1.5])
async def test_choices_hold_with_and_without_guidance(trio_engines: Mapping[Role, Engine], alpha: float) -> None:
    grammar = LLMatcher.grammar_from_lark('start: "yes" | "no" | "maybe not"')
    async with local_service(drafting(), trio_engines) as service:
        for one in asked(service, 4):
            guided = replace(one, grammar=grammar, guidance=replace(one.guidance, alpha=alpha))
            assert (await decode(service.coordinators[0], guided)).content in ("yes", "no", "maybe not")
