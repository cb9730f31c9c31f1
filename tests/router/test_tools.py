"""Answers with tool calls over the API, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.text.tool_formats import FORMATS
from router.api import create_app
from tests.support.scripted_service import ScriptedBackend, client, config, tokenizers
from tests.support.tokenizers import MARKS, byte_level, role_tokenizer

FIND = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "tools": [FIND], "seed": 1}
NAMED = {"type": "function", "function": {"name": "find"}}
ADA, EVE = ("find", '{"who": "Ada"}'), ("find", '{"who": "Eve"}')
TWO = "I ask. " + FORMATS["hermes"].write_all([ADA, EVE])


async def ask(backend: ScriptedBackend, **fields: Any) -> dict[str, Any]:
    async with client(backend) as http:
        response = await http.post("/v1/chat/completions", json=CHAT | fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def stream(backend: ScriptedBackend, **fields: Any) -> list[dict[str, Any]]:
    """The choices of a streamed answer's events."""
    async with client(backend) as http:
        response = await http.post("/v1/chat/completions", json=CHAT | fields | {"stream": True})
    events = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    return [choice for event in events for choice in json.loads(event)["choices"]]


def joined(choices: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client puts together from a stream."""
    content, calls = "", dict[int, dict[str, Any]]()
    for choice in choices:
        content += choice["delta"].get("content") or ""
        for part in choice["delta"].get("tool_calls", ()):
            begun = calls.setdefault(part["index"], {"function": {"name": "", "arguments": ""}})
            begun |= {key: part[key] for key in ("id", "type") if key in part}
            for key, text in part["function"].items():
                begun["function"][key] += text
    return {"content": content, "calls": list(calls.values())}


async def test_a_whole_answer_has_its_content_and_its_calls() -> None:
    choice = (await ask(ScriptedBackend(text=TWO)))["choices"][0]
    assert choice["message"]["content"] == "I ask."
    calls = choice["message"]["tool_calls"]
    assert [(call["type"], *call["function"].values()) for call in calls] == [("function", *ADA), ("function", *EVE)]
    assert choice["finish_reason"] == "tool_calls"
    alone = (await ask(ScriptedBackend(text=FORMATS["hermes"].write_all([ADA]))))["choices"][0]["message"]
    assert alone["content"] is None


async def test_a_stream_gives_the_same_message_piece_by_piece() -> None:
    backend = ScriptedBackend(thought="So", text=TWO)
    choices = await stream(backend)
    message = joined(choices)
    assert message["content"] == "I ask."
    assert [tuple(call["function"].values()) for call in message["calls"]] == [ADA, EVE]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["tool_calls"]
    assert choices[0]["delta"]["role"] == "assistant"


async def test_an_answer_without_calls_is_as_without_tools() -> None:
    choice = (await ask(ScriptedBackend()))["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("It is Eve .", "stop")
    assert "tool_calls" not in choice["message"]
    streamed = await stream(ScriptedBackend())
    assert joined(streamed) == {"content": "It is Eve .", "calls": []}
    assert streamed[-1]["finish_reason"] == "stop"


async def test_calls_in_the_thinking_are_none() -> None:
    backend = ScriptedBackend(thought=FORMATS["hermes"].write_all([ADA]), text="Well.")
    message = (await ask(backend, thinking={"start": "<think>"}))["choices"][0]["message"]
    assert message["content"] == "Well."
    assert "tool_calls" not in message
    assert "find" in message["reasoning"]


@pytest.mark.parametrize(
    ("fields", "reason", "expected"),
    [
        ({}, "stop", "tool_calls"),
        ({"tool_choice": "required"}, "stop", "tool_calls"),
        ({"tool_choice": NAMED}, "stop", "stop"),
        ({}, "length", "length"),
    ],
)
async def test_the_end_of_an_answer_with_calls_is_as_in_openais_api(
    fields: dict[str, Any], reason: Any, expected: str
) -> None:
    backend = ScriptedBackend(text=FORMATS["hermes"].write_all([ADA]))
    backend.reason = reason
    assert (await ask(backend, **fields))["choices"][0]["finish_reason"] == expected
    assert (await stream(backend, **fields))[-1]["finish_reason"] == expected


@pytest.mark.parametrize("fields", [{"parallel_tool_calls": False}, {"tool_choice": NAMED}])
async def test_one_call_is_read_where_one_is_asked_for(fields: dict[str, Any]) -> None:
    assert len((await ask(ScriptedBackend(text=TWO), **fields))["choices"][0]["message"]["tool_calls"]) == 1
    assert len(joined(await stream(ScriptedBackend(text=TWO), **fields))["calls"]) == 1


async def test_every_call_has_an_id_of_its_own() -> None:
    answers = [await ask(ScriptedBackend(text=TWO), n=2) for _ in range(2)]
    ids = [call["id"] for answer in answers for choice in answer["choices"] for call in choice["message"]["tool_calls"]]
    assert len(set(ids)) == 8
    assert all(id_.startswith("call_") for id_ in ids)


async def test_arguments_that_do_not_parse_are_content() -> None:
    text = '<tool_call> {"name": "find", "arguments": {"who": oops}} </tool_call>'
    choice = (await ask(ScriptedBackend(text=text)))["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")


async def test_required_calls_have_a_grammar_and_others_do_not() -> None:
    backend = ScriptedBackend(text=TWO)
    await ask(backend)
    await ask(backend, tool_choice="required")
    await ask(backend, tool_choice="none")
    assert [bool(request.grammar) for request in backend.requests] == [False, True, False]


async def test_unknown_keywords_of_a_strict_function_are_refused_by_name() -> None:
    odd = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    body = CHAT | {"tools": [{"type": "function", "function": {"name": "f", "parameters": odd, "strict": True}}]}
    async with client(ScriptedBackend()) as http:
        response = await http.post("/v1/chat/completions", json=body | {"tool_choice": "required"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools"
    assert "uniqueItems" in response.json()["error"]["message"]


async def test_the_marks_of_calls_are_shown_though_special_tokens_are_skipped() -> None:
    made = tokenizers() | {"target": role_tokenizer(byte_level((*MARKS, "<tool_call>")))}
    backend = ScriptedBackend()
    transport = httpx.ASGITransport(create_app(config(), made, backend))
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as http:
        assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 200
        assert (await http.post("/v1/chat/completions", json=CHAT | {"tool_choice": "none"})).status_code == 200
    shown = [request.shown_specials for request in backend.requests]
    assert shown == [(made["target"].added_tokens["<tool_call>"],), ()]


async def test_the_tokens_of_a_conversation_include_its_tools() -> None:
    async with client(ScriptedBackend()) as http:
        body = {"messages": CHAT["messages"]}
        plain = (await http.post("/tokenize", json=body)).json()
        told = (await http.post("/tokenize", json=body | {"tools": [FIND]})).json()
    assert told["count"] > plain["count"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FUNCTION = st.fixed_dictionaries({"name": st.sampled_from(["f", "find", "a b", ""])}, optional={"parameters": JSON})
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "tools": st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": FUNCTION}), max_size=3)
        | JSON,
        "tool_choice": st.sampled_from(["none", "auto", "required", NAMED]) | JSON,
        "parallel_tool_calls": st.booleans() | JSON,
        "stream": st.booleans(),
    },
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(fields=BODIES, text=st.text(max_size=30))
async def test_no_body_with_tools_ends_in_a_server_error(fields: dict[str, Any], text: str) -> None:
    async with client(ScriptedBackend(text=TWO + text)) as http:
        response = await http.post("/v1/chat/completions", json=CHAT | fields)
    assert response.status_code in (200, 400), response.text
