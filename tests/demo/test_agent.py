"""The embedded trio calls its tool, and answers as JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import pytest

from actors.api.generation import Role
from actors.replica.engine_thread import Engine
from cluster.demo.agent import ANSWER, LOOKUP, lookup, run
from cluster.demo.task import PEOPLE, RELATIONS, questions
from router.api import create_app
from tests.support.deadlines import HANG_S
from tests.support.local_backend import LocalBackend
from tests.support.local_service import local_service, trio_config
from tests.support.scripted_service import serving
from tests.support.tiers import slow

QUESTION = questions("held_out", 2, 1)[0].text
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 120, "seed": 3}
NAMED = {"type": "function", "function": {"name": "lookup"}}


@pytest.fixture
async def url(trio_engines: Mapping[Role, Engine]) -> AsyncIterator[str]:
    config = trio_config()
    async with local_service(config, trio_engines) as service:
        async with serving(create_app(config, service.tokenizers, LocalBackend(service))) as url:
            yield url


async def ask(url: str, **fields: Any) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=url, timeout=HANG_S) as http:
        response = await http.post("/v1/chat/completions", json=BODY | fields)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def arguments(choice: dict[str, Any]) -> list[dict[str, str]]:
    """The arguments of each call, all of which are of the table."""
    calls = [json.loads(call["function"]["arguments"]) for call in choice["message"]["tool_calls"]]
    for call in calls:
        assert list(call) == ["person", "relation"]
        assert call["person"] in PEOPLE
        assert call["relation"] in RELATIONS
    return calls


@pytest.mark.parametrize("model", ["demo", slow("demo/target"), slow("demo/guider")])
async def test_a_required_tool_is_called_with_valid_arguments(url: str, model: str) -> None:
    one = {"model": model, "tools": [LOOKUP], "tool_choice": "required", "parallel_tool_calls": False}
    for temperature in (0, 1):
        choice = await ask(url, **one, temperature=temperature)
        (call,) = arguments(choice)
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        assert lookup(**call) in PEOPLE


async def test_a_budget_of_the_thinking_cuts_no_call(url: str) -> None:
    thinking = {"start": "<think>", "end": "</think>", "max_tokens": 6}
    choice = await ask(url, tools=[LOOKUP], tool_choice=NAMED, thinking=thinking, temperature=1)
    assert choice["message"]["reasoning"]
    assert len(arguments(choice)) == 1
    assert choice["finish_reason"] == "stop"


async def test_a_streamed_call_is_the_same_call(url: str) -> None:
    fields: dict[str, Any] = {"tools": [LOOKUP], "tool_choice": NAMED, "temperature": 1}
    whole = await ask(url, **fields)
    async with httpx.AsyncClient(base_url=url, timeout=HANG_S) as http:
        text = (await http.post("/v1/chat/completions", json=BODY | fields | {"stream": True})).text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    parts = [part for chunk in chunks for part in chunk["choices"][0]["delta"].get("tool_calls", ())]
    written = "".join(part["function"]["arguments"] for part in parts)
    assert written == whole["message"]["tool_calls"][0]["function"]["arguments"]
    assert len(parts) > 1


@pytest.mark.slow
async def test_tools_that_may_be_called_leave_the_answer_free(url: str) -> None:
    choice = await ask(url, tools=[LOOKUP], temperature=0)
    assert choice["finish_reason"] in ("stop", "length", "tool_calls")


async def test_an_answer_as_json_names_a_person(url: str) -> None:
    choice = await ask(url, structured_outputs=ANSWER)
    assert json.loads(choice["message"]["content"])["person"] in PEOPLE


@pytest.mark.slow
async def test_an_answer_with_a_form_names_a_person_or_calls(url: str) -> None:
    either = await ask(url, structured_outputs=ANSWER, tools=[LOOKUP])
    if "tool_calls" in either["message"]:
        arguments(either)
    else:
        assert json.loads(either["message"]["content"])["person"] in PEOPLE


@pytest.mark.slow
async def test_the_agent_calls_and_answers(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with httpx.Client(base_url=url) as client:
        person = await asyncio.to_thread(run, client, QUESTION, 2)
    assert person in PEOPLE
    assert capsys.readouterr().out.count("lookup(") == 2
