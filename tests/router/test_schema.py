from typing import Any

import pytest

from router.backend import BadRequest
from router.schema import NOT_SERVED, ChatRequest, CompletionRequest, parse

CHAT = {"model": "duo", "messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"model": "duo", "prompt": "Hi"}


def refusal(body: Any) -> BadRequest:
    raw = isinstance(body, dict) and "prompt" in body
    with pytest.raises(BadRequest) as caught:
        _ = parse(CompletionRequest, body) if raw else parse(ChatRequest, body)
    return caught.value


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"temprature": 1}, "temprature"),
        ({"guidance": {"alfa": 1}}, "guidance.alfa"),
        ({"thinking": {"begin": ""}}, "thinking.begin"),
        ({"stream_options": {"usage": True}}, "stream_options.usage"),
    ],
)
def test_an_unknown_field_outside_messages_is_refused_by_name(more: dict[str, Any], param: str) -> None:
    error = refusal(CHAT | more)
    assert (error.param, error.code) == (param, "unknown_field")
    assert param in error.message


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"temperature": "warm"}, "temperature"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"stream": 2}, "stream"),
        ({"user": 7}, "user"),
        ({"stop": 7}, "stop"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "", "content": ""}]}, "messages.0.role"),
        ({"messages": [{"role": "judge" * 13, "content": ""}]}, "messages.0.role"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages.0.tool_calls.0.function"),
        ({"guidance": {"schedule": [[0, 1, 2]]}}, "guidance.schedule.0"),
        ({"guidance": {"guide": "never"}}, "guidance.guide"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(more: dict[str, Any], param: str) -> None:
    assert refusal(CHAT | more).param == param


def test_an_image_is_refused_by_its_position() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    error = refusal(CHAT | {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, image]}]})
    assert error.param == "messages.0.content.1"
    assert "image_url is not supported" in error.message


MANY, LONG = list(range(1_025)), "x" * 1_025


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"stop_token_ids": MANY}, "stop_token_ids"),
        ({"allowed_token_ids": MANY}, "allowed_token_ids"),
        ({"logit_bias": {str(id_): 1.0 for id_ in MANY}}, "logit_bias"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"stop": LONG}, "stop"),
        ({"stop": [LONG]}, "stop"),
        ({"bad_words": ["x"] * 1_025}, "bad_words"),
        ({"bad_words": [LONG]}, "bad_words"),
        ({"guidance": {"schedule": [[n, 1.0] for n in range(257)]}}, "guidance.schedule"),
        ({"thinking": {"end": LONG}}, "thinking.end"),
        ({"thinking": {"wait": LONG}}, "thinking.wait"),
        ({"thinking": {"closing": LONG}}, "thinking.closing"),
    ],
)
def test_fields_processed_at_every_token_are_bounded(more: dict[str, Any], param: str) -> None:
    assert (refusal(CHAT | more).param or "").startswith(param)


@pytest.mark.parametrize("name", sorted(NOT_SERVED))
def test_an_unsupported_field_accepts_only_its_neutral_values(name: str) -> None:
    for neutral in NOT_SERVED[name]:
        assert parse(ChatRequest, CHAT | {name: neutral}).model == "duo"
    error = refusal(CHAT | {name: {"something": 1}})
    assert (error.param, error.code) == (name, "unsupported")


def test_logprobs_zero_still_requests_log_probabilities() -> None:
    assert parse(CompletionRequest, TEXT | {"logprobs": 0}).candidates == 0
    assert parse(CompletionRequest, TEXT).candidates is None


def test_openai_fields_without_effect_are_accepted() -> None:
    assert parse(ChatRequest, CHAT | {"user": "me", "metadata": {"a": "b"}, "store": True}).n == 1


def test_null_means_the_default() -> None:
    request = parse(ChatRequest, CHAT | dict.fromkeys(("n", "stream", "seed", "temperature", "stop", "guidance")))
    assert (request.n, request.stream, request.temperature) == (1, False, None)


@pytest.mark.parametrize(
    "more",
    [
        {"reasoning": "Hm"},
        {"annotations": [{"type": "url_citation"}], "audio": {"id": "a"}, "function_call": None},
        {"provider_specific_fields": {"reasoning": None}, "thinking_blocks": [{"type": "thinking"}]},
        {"parsed": {"name": "Eve"}, "reasoning_details": [{"type": "reasoning.text"}], "cache_control": {}},
    ],
    ids=["ours", "openais", "litellms", "others"],
)
def test_an_answer_can_be_sent_back_unchanged(more: dict[str, Any]) -> None:
    answer = {"role": "assistant", "content": "Eve", "refusal": None, "tool_calls": None} | more
    assert parse(ChatRequest, CHAT | {"messages": [*CHAT["messages"], answer]}).messages[1].content == "Eve"


@pytest.mark.parametrize("prompt", ["Hi", ["Hi", "Ho"], [1, 2], [[1], [2, 3]]])
def test_a_prompt_has_four_forms(prompt: Any) -> None:
    assert parse(CompletionRequest, TEXT | {"prompt": prompt}).prompt == prompt


@pytest.mark.parametrize("prompt", [1, {"a": 1}, [1, "a"], [[1.5]], [None], None])
def test_any_other_prompt_is_refused(prompt: Any) -> None:
    assert (refusal(TEXT | {"prompt": prompt}).param or "").startswith("prompt")


@pytest.mark.parametrize("body", [[], "text", 1, None])
def test_a_body_that_is_not_an_object_is_refused(body: Any) -> None:
    assert "JSON object" in refusal(body).message


def test_a_missing_field_is_named() -> None:
    assert refusal({"model": "duo"}).param == "messages"
