"""Log-probabilities and explanations of answers, against plain transformers forwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from actors.api.generation import ROLES, Candidates, Generate, Resume, Role, Tally, TokenNote
from actors.api.guidance import Guidance
from actors.api.sampling_params import Sampling, Thinking
from actors.replica.engine_thread import Engine
from tests.support.local_service import LocalService, decode, local_service, trio_config
from tests.support.oracle import Oracle, Row
from tests.support.trio import TEXT, chat_prompts, request

CLOSE = 5e-5  # nats: plain forwards differ from the engine's by about 1e-5
UNSEEN = 0.0005  # mass outside the candidates above which a row is widened
SAMPLED = Sampling(temperature=1.0, max_tokens=24)


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


async def notes_of(service: LocalService, one: Generate) -> list[TokenNote]:
    answer = await decode(service.coordinators[0], one)
    assert [note.id for note in answer.notes] == answer.tokens
    return answer.notes


def normalised(rows: Row) -> Row:
    top = rows.max(axis=-1, keepdims=True)
    return np.asarray(rows - top - np.log(np.exp(rows - top).sum(axis=-1, keepdims=True)))


def requests_to(service: LocalService, **more: Any) -> list[Generate]:
    """Requests with questions and one text unlike the training data, at different alphas."""
    texts = [*chat_prompts(3), "1, 2, 3,"]
    return [
        replace(
            request(service.tokenizers, text, sampling=SAMPLED, seed=i, chat=i < 3, guidance=Guidance(alpha)), **more
        )
        for i, (text, alpha) in enumerate(zip(texts, (1.0, 0.6, 0.0, 1.5), strict=True))
    ]


@pytest.mark.parametrize("exchange", [{}, {"mode": "full"}, {"k": 32}])
async def test_log_probabilities_are_those_of_the_combined_whole_rows(
    oracle: Oracle, trio_engines: Mapping[Role, Engine], exchange: dict[str, Any]
) -> None:
    async with local_service(trio_config(exchange=exchange), trio_engines) as service:
        for one in requests_to(service, logprobs=20):
            notes = await notes_of(service, one)
            expected = oracle.combined(one.prompts["target"], [note.id for note in notes], one.guidance.alpha)
            for note, row in zip(notes, normalised(expected), strict=True):
                assert note.scores is not None
                assert note.scores.logprob == pytest.approx(row[note.id], abs=CLOSE + UNSEEN)
                ids, values = (np.array(column) for column in zip(*note.scores.guided, strict=True))
                np.testing.assert_allclose(values, row[ids], atol=CLOSE + UNSEEN)
                # A candidate that no slice shows may be missing, but is never likelier than what rows are widened for.
                best = np.sort(row)[::-1][:20]
                likely = best > np.log(UNSEEN) if "k" in exchange else np.full(20, True)
                np.testing.assert_allclose(values[likely], best[likely], atol=CLOSE + UNSEEN)


async def test_explanations_are_each_models_own_log_probabilities(
    oracle: Oracle, trio_engines: Mapping[Role, Engine]
) -> None:
    async with local_service(trio_config(), trio_engines) as service:
        for one in requests_to(service, explain=True):
            notes = await notes_of(service, one)
            prompt, answer = one.prompts["target"], [note.id for note in notes]
            rows = {role: normalised(oracle.alone(role, prompt, answer)) for role in ROLES}
            combined = normalised(oracle.combined(prompt, answer, one.guidance.alpha))
            for place, note in enumerate(notes):
                assert note.scores is not None
                listed: dict[Role, Candidates] = {"target": note.scores.target, "guider": note.scores.guider}
                for role, candidates in listed.items():
                    if role == "guider" and not one.guidance.alpha:
                        assert not candidates
                        continue
                    assert len(candidates) == 5
                    best = np.sort(rows[role][place])[::-1][:5]
                    np.testing.assert_allclose([value for _, value in candidates], best, atol=CLOSE)
                shift = combined[place, note.id] - rows["target"][place, note.id]
                assert note.scores.shift == pytest.approx(shift, abs=CLOSE + UNSEEN)
                assert note.alpha == one.guidance.alpha


async def test_more_candidates_than_a_slice_has_come_from_wider_rows(trio_engines: Mapping[Role, Engine]) -> None:
    config = trio_config(exchange={"k": 4, "max_unseen_mass": 1})
    async with local_service(config, trio_engines) as service:
        for one in requests_to(service, logprobs=20):
            notes = await notes_of(service, one)
            assert {len(note.scores.guided) for note in notes if note.scores} == {20}


HISTORIES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "penalties and a bias": {
        "sampling": replace(SAMPLED, frequency_penalty=0.7, repetition_penalty=1.2, logit_bias=((300, 4.0),))
    },
    "a thinking budget": {"thinking": Thinking(start="<think>", max_tokens=7)},
    "a warm-up": {"guidance": Guidance(1.0, warmup_tokens=5)},
    "greed": {"sampling": replace(SAMPLED, temperature=0.0)},
}


@pytest.mark.parametrize("kind", HISTORIES)
async def test_speculation_changes_no_log_probability(trio_engines: Mapping[Role, Engine], kind: str) -> None:
    config = trio_config(speculation={"adapt": False}, exchange={"audit_every": 3})
    async with local_service(config, trio_engines) as service:
        one = replace(
            request(service.tokenizers, TEXT, seed=5, **({"sampling": SAMPLED} | HISTORIES[kind])), explain=True
        )
        plain = await notes_of(service, replace(one, drafts=0))
        drafted = await notes_of(service, replace(one, drafts=4))
        assert [replace(note, drafted=False) for note in drafted] == plain
        assert any(note.drafted for note in drafted)
        assert not any(note.drafted for note in plain)


async def test_log_probabilities_change_no_token(trio_engines: Mapping[Role, Engine]) -> None:
    async with local_service(trio_config(), trio_engines) as service:
        for one in requests_to(service):
            bare = await decode(service.coordinators[0], one)
            asked = await decode(service.coordinators[0], replace(one, logprobs=5, explain=True))
            assert asked.tokens == bare.tokens
            assert bare.notes == []


async def test_a_resumed_answer_has_the_notes_of_its_remaining_tokens(trio_engines: Mapping[Role, Engine]) -> None:
    async with local_service(trio_config(), trio_engines) as service:
        one = replace(requests_to(service)[0], logprobs=3, explain=True)
        whole = await notes_of(service, one)
        rest = await notes_of(service, replace(one, resume=Resume([note.id for note in whole[:7]], Tally(guided=7))))
        assert [replace(note, drafted=False) for note in rest] == [replace(note, drafted=False) for note in whole[7:]]
