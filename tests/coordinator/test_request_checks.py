"""Checks of a request before a coordinator accepts it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from actors.api.generation import ROLES, Generate, Rejected, Role
from actors.api.guidance import Guidance
from actors.api.sampling_params import Sampling, Thinking
from actors.coordinator import request_checks as admission
from actors.text.tokenizer import RoleTokenizer
from actors.text.vocabularies import VocabularyRegistry
from tests.support.tokenizers import MARKS, byte_level

ENDS = (301, 300)  # <|end|> and <|turn|>, that order
FIRST, SECOND = ENDS
WIDTH = 400


@pytest.fixture(scope="module")
def vocabularies() -> VocabularyRegistry:
    settings, config = {"eos_token": "<|end|>"}, {"vocab_size": WIDTH}
    tokenizer = RoleTokenizer(byte_level(MARKS), settings, config, {"eos_token_id": list(ENDS)})
    assert tokenizer.eos_ids == ENDS
    return VocabularyRegistry(dict.fromkeys(ROLES, tokenizer))


def request(
    sampling: Sampling | None = None,
    guidance: Guidance | None = None,
    prompts: dict[Role, list[int]] | None = None,
    primary: Role = "target",
) -> Generate:
    prompts = {role: [1, 2] for role in ROLES} if prompts is None else prompts
    return Generate("r", primary, prompts, sampling or Sampling(), guidance or Guidance(), Thinking(), 1)


def refused(one: Generate, vocabularies: VocabularyRegistry) -> str:
    """Message with which a request is refused."""
    answer = admission.rejection(one, vocabularies)
    assert isinstance(answer, Rejected)
    assert (answer.code, answer.retry_after_s) == ("invalid", None)
    return answer.message


def test_a_valid_request_is_accepted(vocabularies: VocabularyRegistry) -> None:
    bias = ((5, 1.0), (FIRST, -1.0), (SECOND, 2.0))
    assert admission.rejection(request(), vocabularies) is None
    assert admission.rejection(request(Sampling(logit_bias=bias, stop_token_ids=(7, SECOND))), vocabularies) is None


@pytest.mark.parametrize("stray", [-1, WIDTH - 1, WIDTH, 10**9])
def test_bias_on_ids_that_do_not_exist_is_refused_by_name(vocabularies: VocabularyRegistry, stray: int) -> None:
    assert str(stray) in refused(request(Sampling(logit_bias=((5, 1.0), (stray, 1.0)))), vocabularies)


def test_negative_stop_ids_are_refused_by_name(vocabularies: VocabularyRegistry) -> None:
    assert "-3" in refused(request(Sampling(stop_token_ids=(5, -3))), vocabularies)


@pytest.mark.parametrize("empty", ROLES)
def test_an_empty_prompt_of_any_role_is_refused(vocabularies: VocabularyRegistry, empty: Role) -> None:
    prompts: dict[Role, list[int]] = {role: [] if role == empty else [1] for role in ROLES}
    assert "empty" in refused(request(prompts=prompts), vocabularies)


@pytest.mark.parametrize("lacking", ROLES)
def test_guidance_without_a_prompt_for_every_role_is_refused(vocabularies: VocabularyRegistry, lacking: Role) -> None:
    prompts: dict[Role, list[int]] = {role: [1] for role in ROLES if role != lacking}
    late = Guidance(0.0, schedule=((100, 1.0),))
    for guidance in (Guidance(1.0), Guidance(1.0, warmup_tokens=100), late):
        assert "guider_base" in refused(request(guidance=guidance, prompts=prompts), vocabularies)


@pytest.mark.parametrize("primary", ROLES)
def test_without_guidance_the_primarys_prompt_is_enough(vocabularies: VocabularyRegistry, primary: Role) -> None:
    alone = request(guidance=Guidance(0.0), prompts={primary: [1]}, primary=primary)
    assert admission.rejection(alone, vocabularies) is None
    others: dict[Role, list[int]] = {role: [1] for role in ROLES if role != primary}
    assert primary in refused(replace(alone, prompts=others), vocabularies)


def test_every_end_id_is_replaced_by_the_first(vocabularies: VocabularyRegistry) -> None:
    sampling = Sampling(logit_bias=((SECOND, 2.0), (5, 1.0)), stop_token_ids=(SECOND, 9, FIRST))
    changed = admission.canonical(request(sampling), vocabularies).sampling
    assert changed.logit_bias == ((FIRST, 2.0), (5, 1.0))
    assert changed.stop_token_ids == (9, FIRST)


def test_a_request_without_end_ids_stays_as_it_is(vocabularies: VocabularyRegistry) -> None:
    asked = request(Sampling(logit_bias=((5, 1.0), (4, 0.5)), stop_token_ids=(7, 9), temperature=0.5))
    assert admission.canonical(asked, vocabularies) == asked


def test_allowed_ids_must_exist_and_ends_among_them_are_one(vocabularies: VocabularyRegistry) -> None:
    assert str(WIDTH) in refused(request(Sampling(allowed_token_ids=(5, WIDTH))), vocabularies)
    asked = admission.canonical(request(Sampling(allowed_token_ids=(SECOND, 5))), vocabularies)
    assert asked.sampling.allowed_token_ids == (5, FIRST)


@pytest.mark.parametrize("stray", [-1, WIDTH, 10**9])
@pytest.mark.parametrize("role", ROLES)
def test_a_prompt_token_without_a_row_is_refused_by_id(
    vocabularies: VocabularyRegistry, role: Role, stray: int
) -> None:
    prompts = {each: [1, stray] if each == role else [1, 2] for each in ROLES}
    message = refused(request(prompts=prompts), vocabularies)
    assert f"the prompt has the token ids [{stray}] of the {role}" in message


@pytest.mark.parametrize(
    ("thinking", "field"),
    [
        (Thinking(end="<far>", max_tokens=5), "thinking.end"),
        (Thinking(closing="<far>", max_tokens=5), "thinking.closing"),
        (Thinking(wait="<far>", min_tokens=5), "thinking.wait"),
        (Thinking(end="<far>"), None),  # never forced
    ],
)
def test_a_forced_token_without_a_row_is_refused_by_id(thinking: Thinking, field: str | None) -> None:
    built = byte_level((*MARKS, "<far>"))
    far = built.token_to_id("<far>")
    tokenizer = RoleTokenizer(built, {"eos_token": "<|end|>"}, {"vocab_size": far})
    assert tokenizer.beyond_width == {"<far>": far}
    answer = admission.rejection(
        replace(request(), thinking=thinking), VocabularyRegistry(dict.fromkeys(ROLES, tokenizer))
    )
    assert (answer is not None and f"{field} has the token ids [{far}]" in answer.message) is (field is not None)
