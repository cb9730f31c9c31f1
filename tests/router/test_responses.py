from dataclasses import replace
from math import log

import pytest

from actors.api.generation import Delta, Finished, Scores, TokenNote, Usage
from router.logprobs import TokenFormatter
from router.responses import ChatFormat, CompletedChoice, CompletionFormat, usage_body
from tests.support.tokenizers import role_tokenizer

COUNTS = Usage(9, 4, 2, 3, 1, 2, 0.5)
TOKENIZER = role_tokenizer()
TOKENS = TokenFormatter(TOKENIZER)
A, EVE = TOKENIZER.encode("a")[0], TOKENIZER.encode("e")[0]
END = Finished("stop", COUNTS, "END")


def test_a_prompt_counts_once_and_masses_are_weighted_by_guided_tokens() -> None:
    body = usage_body([COUNTS, Usage(9, 6, 0, 1, 0, 0, 0.1)], prompt_tokens=9)
    assert (body["prompt_tokens"], body["completion_tokens"], body["total_tokens"]) == (9, 10, 19)
    assert body["completion_tokens_details"]["reasoning_tokens"] == 2
    assert body["guidance"] == {"guided_tokens": 4, "changed_tokens": 1, "widened_rows": 2, "uncovered_mass": 0.4}


def test_the_cached_tokens_of_a_prompt_are_those_of_its_first_choice() -> None:
    usages = [replace(COUNTS, cached_tokens=tokens) for tokens in (0, 16, 32, 16)]
    assert usage_body(usages, 18, choices_per_prompt=2)["prompt_tokens_details"] == {"cached_tokens": 32}
    assert usage_body(usages, 36)["prompt_tokens_details"] == {"cached_tokens": 64}


def test_an_unguided_answer_has_no_uncovered_mass() -> None:
    assert usage_body([Usage(9, 4, 0, 0, 0, 0, 0.0)], 9)["guidance"]["uncovered_mass"] == 0.0


def test_drafts_that_were_not_accepted_count_as_rejected() -> None:
    body = usage_body([replace(COUNTS, drafted_tokens=6, accepted_tokens=3), replace(COUNTS, drafted_tokens=2)], 9)
    details = body["completion_tokens_details"]
    assert (details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]) == (3, 5)
    assert body["speculation"] == {"drafted_tokens": 8, "accepted_tokens": 3, "acceptance": 0.375}


def test_an_answer_without_drafts_has_acceptance_zero() -> None:
    assert usage_body([COUNTS], 9)["speculation"] == {"drafted_tokens": 0, "accepted_tokens": 0, "acceptance": 0.0}


def test_thinking_is_returned_under_both_of_its_names() -> None:
    shape = ChatFormat("r", "duo", 7, TOKENS)
    message = shape.body([CompletedChoice(Delta("Hm", "Eve"), END)], 9)["choices"][0]["message"]
    assert {name: value for name, value in message.items() if value is not None} == {
        "role": "assistant",
        "content": "Eve",
        "reasoning": "Hm",
        "reasoning_content": "Hm",
    }
    delta = shape.chunk(0, Delta("Hm"), None, first=False)["choices"][0]["delta"]
    assert delta == {"reasoning": "Hm", "reasoning_content": "Hm"}


def test_an_answer_without_thinking_has_no_field_for_it() -> None:
    shape = ChatFormat("r", "duo", 7, TOKENS)
    message = shape.body([CompletedChoice(Delta("", "Eve"), END)], 9)["choices"][0]["message"]
    assert {key: value for key, value in message.items() if value is not None} == {
        "role": "assistant",
        "content": "Eve",
    }
    assert not message.keys() & {"reasoning", "reasoning_content"}
    assert shape.chunk(0, Delta("", "Eve"), None, first=False)["choices"][0]["delta"] == {"content": "Eve"}


def test_the_first_chunk_of_a_choice_names_the_role() -> None:
    shape = ChatFormat("r", "duo", 7, TOKENS)
    assert shape.chunk(1, None, END, first=True)["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert shape.chunk(1, Delta(content="a"), None, first=False)["choices"][0]["delta"] == {"content": "a"}


def test_an_explanation_describes_each_token() -> None:
    scores = Scores(log(0.5), log(2.0), ((EVE, log(0.5)),), target=((A, log(0.75)), (EVE, log(0.25))))
    delta = Delta(content="e", tokens=[EVE], notes=[TokenNote(EVE, "e", 1.0, True, True, scores)])
    choice = CompletionFormat("r", "duo", 7, TOKENS, explain=True).chunk(0, delta, END, first=True)["choices"][0]
    (explanation,) = choice["guidance"]["tokens"]
    assert {name: explanation[name] for name in ("id", "text", "alpha", "changed", "drafted", "guider")} == {
        "id": EVE,
        "text": "e",
        "alpha": 1.0,
        "changed": True,
        "drafted": True,
        "guider": [],
    }
    assert (explanation["shift"], explanation["probability"]) == (log(2.0), pytest.approx(0.5))
    assert explanation["target"] == [
        {"id": A, "text": "a", "probability": pytest.approx(0.75)},
        {"id": EVE, "text": "e", "probability": pytest.approx(0.25)},
    ]
    assert explanation["guided"] == [{"id": EVE, "text": "e", "probability": pytest.approx(0.5)}]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("e", "stop", "END")


def test_the_seed_that_was_used_is_returned() -> None:
    assert CompletionFormat("r", "duo", 7, TOKENS).body([CompletedChoice(Delta(), END)], 9)["seed"] == 7


def test_a_forced_token_has_no_explanation() -> None:
    note = TokenFormatter(TOKENIZER).explain(TokenNote(A, "a", 1.0, False))
    assert (note["shift"], note["probability"]) == (None, None)
    assert note["target"] == note["guider"] == note["guided"] == []
