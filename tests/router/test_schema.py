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
        ({"messages": [{"role": "user", "content": "Hi", "colour": "red"}]}, "messages.0.colour"),
    ],
)
def test_an_unknown_field_is_refused_by_name_at_every_level(more: dict[str, Any], param: str) -> None:
    error = refusal(CHAT | more)
    assert (error.param, error.code) == (param, "unknown_field")
    assert param in error.message


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"temperature": "0.5"}, "temperature"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"stream": 1}, "stream"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "judge", "content": ""}]}, "messages.0.role"),
        ({"guidance": {"schedule": [[0, 1, 2]]}}, "guidance.schedule.0"),
        ({"guidance": {"guide": "never"}}, "guidance.guide"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(more: dict[str, Any], param: str) -> None:
    assert refusal(CHAT | more).param == param


def test_an_image_is_refused_where_it_stands() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    error = refusal(CHAT | {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, image]}]})
    assert error.param == "messages.0.content.1"
    assert "image_url is not supported" in error.message


def test_what_is_gone_through_at_every_token_is_bounded() -> None:
    many = list(range(1_025))
    for more in (
        {"stop_token_ids": many},
        {"allowed_token_ids": many},
        {"logit_bias": {str(id_): 1.0 for id_ in many}},
        {"stop": ["x"] * 65},
        {"bad_words": ["x"] * 1_025},
    ):
        assert refusal(CHAT | more).param == next(iter(more))


def test_an_answer_of_openai_can_be_sent_back_as_it_came() -> None:
    answer: dict[str, Any] = {
        "role": "assistant",
        "content": "7",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "tool_calls": None,
    }
    assert parse(ChatRequest, {"model": "duo", "messages": [answer]}).messages[0].content == "7"


@pytest.mark.parametrize("name", sorted(NOT_SERVED))
def test_a_field_that_is_not_served_passes_only_where_it_asks_for_nothing(name: str) -> None:
    for neutral in NOT_SERVED[name]:
        assert parse(ChatRequest, CHAT | {name: neutral}).model == "duo"
    error = refusal(CHAT | {name: {"something": 1}})
    assert (error.param, error.code) == (name, "unsupported")


def test_zero_log_probabilities_of_a_completion_are_still_some() -> None:
    assert parse(CompletionRequest, TEXT | {"logprobs": 0}).candidates == 0
    assert parse(CompletionRequest, TEXT).candidates is None


def test_fields_that_mean_nothing_here_are_ignored_as_openai_does() -> None:
    assert parse(ChatRequest, CHAT | {"user": "me", "metadata": {"a": "b"}, "store": True}).n == 1


def test_null_means_the_default() -> None:
    request = parse(ChatRequest, CHAT | dict.fromkeys(("n", "stream", "seed", "temperature", "stop", "guidance")))
    assert (request.n, request.stream, request.temperature) == (1, False, None)


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    answer = {"role": "assistant", "content": "Eve", "reasoning": "Hm", "refusal": None, "tool_calls": None}
    assert parse(ChatRequest, CHAT | {"messages": [*CHAT["messages"], answer]}).messages[1].content == "Eve"


@pytest.mark.parametrize("prompt", ["Hi", ["Hi", "Ho"], [1, 2], [[1], [2, 3]]])
def test_a_prompt_has_four_forms(prompt: Any) -> None:
    assert parse(CompletionRequest, TEXT | {"prompt": prompt}).prompt == prompt


@pytest.mark.parametrize("prompt", [1, {"a": 1}, [1, "a"], [[1.5]], [None], None])
def test_any_other_prompt_is_refused(prompt: Any) -> None:
    assert (refusal(TEXT | {"prompt": prompt}).param or "").startswith("prompt")


@pytest.mark.parametrize("body", [[], "text", 1, None])
def test_a_body_that_is_no_object_is_refused(body: Any) -> None:
    assert "JSON object" in refusal(body).message


def test_a_missing_field_is_named() -> None:
    assert refusal({"model": "duo"}).param == "messages"
