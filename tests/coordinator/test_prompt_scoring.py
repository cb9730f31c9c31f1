"""Log-probabilities of prompts, against plain transformers forwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from actors.api.generation import ROLES, Generate, PromptNote, Rejected, Resume, Role
from actors.api.guidance import Guidance
from actors.coordinator import session
from actors.replica.engine_thread import Engine
from tests.coordinator.test_logprobs import SAMPLED, normalised
from tests.support.local_service import LocalService, decode, local_service, trio_config
from tests.support.near_ties import rounding_varies, same
from tests.support.oracle import Oracle
from tests.support.trio import TEXT, finished, request
from tests.support.watched import watched

CLOSE = 5e-4  # nats: the models never saw such texts, and their float32 differs by more between shapes of forwards
LONG_TEXT = "The rival of Ada is Bo. The doctor of Bo is Eve. Who is the mentor of the rival of Ada? 1, 2, 3, 漢字 " * 2


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


def scored(service: LocalService, text: str = LONG_TEXT, alpha: float = 1.0, **more: Any) -> Generate:
    one = request(service.tokenizers, text, sampling=SAMPLED, chat=False, guidance=Guidance(alpha))
    return replace(one, **{"prompt_logprobs": 3, "only_prompt": True, **more})


async def notes_of(service: LocalService, one: Generate) -> list[PromptNote]:
    answer = await decode(service.coordinators[0], one)
    assert finished(answer).reason in ("stop", "length")
    return answer.prompt


def same_scores(found: list[PromptNote], expected: list[PromptNote]) -> bool:
    """True if prompts have equal scores; if the engine's rounding depends on the batch, equal but for that."""
    return found == expected or (
        rounding_varies()
        and [note.id for note in found] == [note.id for note in expected]
        and [note.logprob for note in found[1:]] == pytest.approx([note.logprob for note in expected[1:]], abs=CLOSE)
    )


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.5])
async def test_a_prompt_is_scored_by_the_combined_whole_rows(
    oracle: Oracle, trio_engines: Mapping[Role, Engine], alpha: float
) -> None:
    async with local_service(trio_config(), trio_engines) as service:
        one = scored(service, alpha=alpha)
        tokens = one.prompts["target"]
        first, *notes = await notes_of(service, one)
        assert first == PromptNote(tokens[0], None)
        assert len(tokens) > 2 * session._ROWS  # so that it takes several forwards
        assert [note.id for note in notes] == tokens[1:]
        rows = normalised(oracle.combined(tokens[:1], tokens[1:], alpha))
        for note, row in zip(notes, rows, strict=True):
            assert note.logprob == pytest.approx(row[note.id], abs=CLOSE)
            assert note.rank == pytest.approx(1 + np.count_nonzero(row > row[note.id]), abs=2)  # near ties
            np.testing.assert_allclose([value for _, value in note.guided], np.sort(row)[::-1][:3], atol=CLOSE)


async def test_a_prompt_is_scored_at_the_requests_alpha_whatever_its_warm_up(
    trio_engines: Mapping[Role, Engine],
) -> None:
    async with local_service(trio_config(), trio_engines) as service:
        one = scored(service)
        warm = replace(one, guidance=Guidance(1.0, warmup_tokens=50))
        assert same_scores(await notes_of(service, warm), await notes_of(service, one))


async def test_scoring_a_prompt_changes_no_token_of_its_answer(trio_engines: Mapping[Role, Engine]) -> None:
    async with local_service(trio_config(), trio_engines) as service:
        for one in (
            scored(service, only_prompt=False),
            scored(service, only_prompt=False, drafter="guider", alpha=0.0),
        ):
            bare = await decode(service.coordinators[0], replace(one, prompt_logprobs=None))
            asked = await decode(service.coordinators[0], one)
            assert same(asked.tokens, bare.tokens)
            assert len(asked.tokens) > 5
            assert bare.prompt == []
            assert same_scores(asked.prompt, await notes_of(service, replace(one, only_prompt=True)))


async def test_a_prompt_of_one_token_has_nothing_to_score(trio_engines: Mapping[Role, Engine]) -> None:
    async with local_service(trio_config(), trio_engines) as service:
        one = scored(service, only_prompt=False)
        one = replace(one, prompts={role: tokens[:1] for role, tokens in one.prompts.items()})
        answer = await decode(service.coordinators[0], one)
        assert answer.prompt == [PromptNote(one.prompts["target"][0], None)]
        assert answer.tokens


async def test_a_resumed_prompt_is_scored_from_where_it_stopped(trio_engines: Mapping[Role, Engine]) -> None:
    async with local_service(trio_config(), trio_engines) as service:
        one = scored(service)
        whole = await notes_of(service, one)
        for scored_before in (1, 20, 33, len(whole)):
            rest = await notes_of(service, replace(one, resume=Resume(scored=scored_before)))
            assert same_scores(rest, whole[scored_before:])


@pytest.mark.parametrize("role", ROLES)
async def test_a_cache_lost_in_the_middle_of_a_prompt_changes_no_score(
    trio_engines: Mapping[Role, Engine], role: Role
) -> None:
    async with local_service(trio_config(), trio_engines) as service:
        expected = await notes_of(service, scored(service))
    with watched(trio_engines) as trio:
        trio.disturb(lambda engine: engine.forget_everything() if engine.forwards % 3 == 0 else None, role)
        async with local_service(trio_config(), trio.engines) as service:
            assert same_scores(await notes_of(service, scored(service)), expected)
        assert trio.watched[role].forwards > -(-len(scored(service).prompts[role]) // session._ROWS)


async def test_small_models_read_a_prompt_of_tokens_as_the_target_does(
    oracle: Oracle, trio_engines: Mapping[Role, Engine]
) -> None:
    async with local_service(trio_config(), trio_engines) as service:
        one = scored(service, TEXT)
        spelled = [token for text in TEXT for token in service.tokenizers["target"].encode(text)]  # letter by letter
        assert len(spelled) > len(one.prompts["guider"])
        notes = await notes_of(service, replace(one, prompts={**one.prompts, "target": spelled}))
        rows = normalised(oracle.combined(spelled[:1], spelled[1:], 1.0))
        for note, row in zip(notes[1:], rows, strict=True):
            assert note.logprob == pytest.approx(row[note.id], abs=CLOSE)


async def test_prompts_of_different_text_are_refused_naming_the_role(trio_engines: Mapping[Role, Engine]) -> None:
    async with local_service(trio_config(), trio_engines) as service:
        one = scored(service)
        other = service.tokenizers["guider"].encode("Something else")
        answer = await decode(service.coordinators[0], replace(one, prompts={**one.prompts, "guider": other}))
        assert isinstance(answer.end, Rejected)
        assert answer.end.code == "invalid"
        assert "the guider reads another one" in answer.end.message
