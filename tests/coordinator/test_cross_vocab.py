"""Guidance of a target with another vocabulary, through replicas, sockets and a coordinator."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher

import actors.text.vocabularies
from actors.api.generation import Generate, Rejected, Role
from actors.api.guidance import Guidance
from actors.api.sampling_params import Sampling
from actors.config import ServiceConfig
from actors.replica.build import load_role
from actors.replica.engine_thread import Engine
from actors.text.alignment_cache import align
from actors.text.vocabularies import VocabularyRegistry
from tests.support import families
from tests.support.deadlines import HANG_S
from tests.support.local_service import LocalService, decode, local_service, trio_config
from tests.support.tiers import slow
from tests.support.trained_models import tokenizer
from tests.support.trio import LONG, chat_prompts, decode_all, finished, request, tokens
from tests.support.watched import Trio, WatchedEngine, until, watched

SAMPLINGS = (
    Sampling(temperature=0, max_tokens=28),
    Sampling(temperature=0.6, top_p=0.95, max_tokens=28),
    Sampling(temperature=1.0, max_tokens=28),
)
FAMILIES = ("pieces", slow("grouped"), slow("bytes"))


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write_target(tmp_path_factory.mktemp(request.param), tokenizer(request.param))


@pytest.fixture(scope="module")
def engines(folder: Path, trio_engines: Mapping[Role, Engine]) -> Mapping[Role, Engine]:
    return families.engines(families.with_target(folder), trio_engines)


@pytest.fixture
def trio(engines: Mapping[Role, Engine]) -> Iterator[Trio]:
    with watched(engines) as trio:
        yield trio


def drafting(folder: Path, **overrides: Any) -> ServiceConfig:
    places = {"max_sessions": 100, "max_waiting": 100}
    return families.with_target(folder, speculation={"drafts": 8, "adapt": False}, coordinator=places, **overrides)


async def test_log_probabilities_from_slices_are_those_of_whole_rows(folder: Path, trio: Trio) -> None:
    found = []
    for mode in ("topk", "full"):
        async with local_service(families.with_target(folder, exchange={"mode": mode}), trio.engines) as service:
            one = request(service.tokenizers, chat_prompts(3)[2], sampling=SAMPLINGS[0], guidance=Guidance(1.0))
            answer = await decode(service.coordinators[0], replace(one, explain=True, logprobs=3))
            found.append((answer.tokens, answer.notes))
            refused = await decode(service.coordinators[0], replace(one, prompt_logprobs=1))
            assert isinstance(refused.end, Rejected)
            assert "target's family" in refused.end.message
    (tokens_of_slices, sliced), (tokens_of_rows, whole) = found
    assert tokens_of_slices == tokens_of_rows
    scores = [[note.scores for note in notes if note.scores] for notes in (sliced, whole)]
    assert [len(each.target) for each in scores[0]] == [5] * len(tokens_of_rows)
    errors = [abs(one.logprob - other.logprob) for one, other in zip(*scores, strict=True)]
    # Up to half of this target's mass is outside the slices, and how guidance lifts it there is estimated; after other
    # prompts it lifts a token from there above all others.
    assert sum(errors) / len(errors) < 0.01
    # Within a character that is not complete a small model, which reads the text, has nothing to say.
    assert {len(note.scores.guider) for note in sliced if note.scores} | {0} == {0, 5}


def varied_requests(service: LocalService, count: int = 18) -> list[Generate]:
    """Questions with every way of sampling; half of the answers go on to their last token."""
    return [
        request(
            service.tokenizers,
            text,
            sampling=replace(SAMPLINGS[i % 3], ignore_eos=i % 2 == 1),
            guidance=Guidance((1.0, 1.5)[i % 2], warmup_tokens=(0, 0, 0, 7)[i % 4]),
            seed=i,
        )
        for i, text in enumerate(chat_prompts(count))
    ]


def drafts(requests: list[Generate], count: int | None = None) -> list[Generate]:
    """Requests with so many drafts, or with every length in turn."""
    return [replace(one, drafts=i % 8 + 1 if count is None else count) for i, one in enumerate(requests)]


async def answers(service: LocalService, requests: list[Generate]) -> list[list[int]]:
    return tokens(await decode_all(service.coordinators[0], requests))


async def test_drafts_of_another_family_change_no_token(folder: Path, engines: Mapping[Role, Engine]) -> None:
    async with local_service(drafting(folder), engines) as service:
        requests = varied_requests(service)
        expected = await answers(service, drafts(requests, 0))
        decoded = await decode_all(service.coordinators[0], drafts(requests))
        assert tokens(decoded) == expected
        assert sum(finished(answer).usage.drafted_tokens for answer in decoded) > 0
        for replica in service.replicas.values():
            await replica.check_cache()


async def test_other_sessions_change_no_token(folder: Path, engines: Mapping[Role, Engine]) -> None:
    async with local_service(drafting(folder), engines) as service:
        requests = varied_requests(service, 9)
        together = await answers(service, requests)
        alone = [(await answers(service, [one]))[0] for one in requests]
        assert together == alone


async def test_slices_choose_what_whole_rows_choose(folder: Path, engines: Mapping[Role, Engine]) -> None:
    # Of it the pair says nothing: where guidance presses all else down, whole rows see it rise, and slices lack it.
    unknown = tokenizer("pieces").added_tokens["<unk>"]

    def greedy(service: LocalService) -> list[Generate]:
        changed: dict[str, Any] = {"temperature": 0.0, "logit_bias": ((unknown, -100.0),)}
        return [replace(one, sampling=replace(one.sampling, **changed)) for one in varied_requests(service, 12)]

    async with local_service(drafting(folder), engines) as service:
        sliced = await answers(service, greedy(service))
    async with local_service(drafting(folder, exchange={"mode": "full"}), engines) as service:
        assert await answers(service, greedy(service)) == sliced


async def test_a_grammar_of_the_target_holds_whatever_family_the_small_models_are_of(
    folder: Path, engines: Mapping[Role, Engine]
) -> None:
    schema = {
        "type": "object",
        "properties": {"person": {"type": "string", "pattern": "^[A-Z][a-z]{1,8}$"}, "hops": {"enum": [1, 2, 3]}},
        "required": ["person", "hops"],
        "additionalProperties": False,
    }
    grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})

    def asked(service: LocalService, drafts: int) -> list[Generate]:
        requests = varied_requests(service, 6)
        return [
            replace(one, grammar=grammar, drafts=drafts, sampling=replace(one.sampling, max_tokens=120))
            for one in requests
        ]

    async with local_service(drafting(folder), engines) as service:
        plain = await decode_all(service.coordinators[0], asked(service, 0))
        assert tokens(await decode_all(service.coordinators[0], asked(service, 5))) == tokens(plain)
    for answer in plain:
        assert finished(answer).reason == "stop"
        assert set(json.loads(answer.content)) == {"person", "hops"}
    narrow = {"k": 2, "max_unseen_mass": 1e-9}
    async with local_service(drafting(folder, exchange=narrow), engines) as service:
        sliced = tokens(await decode_all(service.coordinators[0], asked(service, 3)))
    async with local_service(drafting(folder, exchange={"mode": "full"}), engines) as service:
        assert tokens(await decode_all(service.coordinators[0], asked(service, 0))) == sliced


async def test_audits_and_wider_rows_change_no_token(folder: Path, engines: Mapping[Role, Engine]) -> None:
    async with local_service(drafting(folder, exchange={"audit_every": 0}), engines) as service:
        expected = await answers(service, varied_requests(service, 9))
    async with local_service(drafting(folder, exchange={"audit_every": 3}), engines) as service:
        assert await answers(service, varied_requests(service, 9)) == expected
        assert service.coordinators[0]._loop.meter.audited_rows.value > 0


async def test_a_guider_that_is_its_base_leaves_the_target_alone(folder: Path, engines: Mapping[Role, Engine]) -> None:
    again = load_role(trio_config(), "guider_base")
    async with local_service(drafting(folder), {**engines, "guider": again}) as service:
        requests = [replace(one, guidance=Guidance(1.0)) for one in varied_requests(service, 6)]
        alone = [replace(one, guidance=Guidance(0.0)) for one in requests]
        assert await answers(service, requests) == await answers(service, alone)


@pytest.mark.parametrize("role", [slow("target"), "guider", slow("guider_base")])
async def test_lost_caches_change_no_token(trio: Trio, folder: Path, role: Role) -> None:
    def act(engine: WatchedEngine) -> None:
        if engine.forwards % 4 == 0:
            engine.forget_everything()

    async with local_service(drafting(folder), trio.engines) as service:
        requests = varied_requests(service, 9)
        expected = await answers(service, drafts(requests, 0))
        trio.disturb(act, role)
        assert await answers(service, drafts(requests)) == expected


@pytest.mark.parametrize("role", [slow("guider"), "guider_base"])
async def test_lost_held_rows_change_no_token(trio: Trio, folder: Path, role: Role) -> None:
    lost = 0

    def act(engine: WatchedEngine) -> None:
        nonlocal lost
        if engine.forwards % 10 == 0:
            for session in engine._sessions:
                lost += engine.rows(session) is not None
                engine._store.drop(session)

    async with local_service(drafting(folder), trio.engines) as service:
        requests = varied_requests(service, 9)
        expected = await answers(service, drafts(requests, 0))
        trio.disturb(act, role)
        assert await answers(service, drafts(requests)) == expected
        assert lost > len(requests)


async def test_a_lost_small_model_changes_no_token(trio: Trio, folder: Path) -> None:
    async with local_service(drafting(folder), trio.engines) as service:
        requests = [
            replace(one, sampling=replace(LONG, max_tokens=60), drafts=4) for one in varied_requests(service, 4)
        ]
        expected = await answers(service, drafts(requests, 0))
        stop_at = trio.watched["guider"].forwards + 15
        going = asyncio.ensure_future(answers(service, requests))
        await until(lambda: trio.watched["guider"].forwards >= stop_at)
        await service.replicas["guider"].stop()
        await service.start_replica("guider")
        assert await asyncio.wait_for(going, HANG_S) == expected
        await until(lambda: set(trio.held().values()) == {0})


async def test_equal_vocabularies_are_read_one_for_one(trio_engines: Mapping[Role, Engine]) -> None:
    async with local_service(trio_config(), trio_engines) as service:
        assert not VocabularyRegistry(service.tokenizers).aligned


async def test_a_vocabulary_aligned_with_itself_guides_as_plain_guidance(
    trio_engines: Mapping[Role, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = trio_config(coordinator={"max_sessions": 60, "max_waiting": 60})
    async with local_service(config, trio_engines) as service:
        asked = [
            request(service.tokenizers, text, sampling=Sampling(temperature=0, max_tokens=60))
            for hops in (2, 3, 4)
            for text in chat_prompts(8, hops)
        ]
        expected = await answers(service, asked)
    monkeypatch.setattr(
        actors.text.vocabularies,
        "small_maps",
        lambda those: {role: align(those["target"], those[role]) for role in those if role != "target"},
    )
    async with local_service(config, trio_engines) as service:
        assert VocabularyRegistry(service.tokenizers).aligned
        assert await answers(service, asked) == expected
