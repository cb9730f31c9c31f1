"""Bodies with formats of answers and tools, changed at random places: each is answered or refused, none is a fault."""

from __future__ import annotations

import json
import os
import random
from typing import Any

import httpx
import pytest

from router.api import create_app
from router.grammars import GrammarChecks
from tests.support.deadlines import HANG_S
from tests.support.generated_schemas import schemas
from tests.support.scripted_service import ScriptedBackend, config, tokenizers

CASES = int(os.environ.get("FORMAT_CASES", "60"))  # 1,000 in `make test-long`
JSON = {"Content-Type": "application/json"}
_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**40, 0.5, -1e308, "", "x", "\x00", "\ud800", "😀", "a" * 70_000),
    *(
        [],
        {},
        [[]],
        [None],
        {"": None},
        {"type": "object"},
        {"type": "json_schema"},
        ["a"] * 2_000,
        "(",
        "start: x",
        "#",
    ),
)
_KEYS = (
    "name",
    "arguments",
    "function",
    "parameters",
    "type",
    "json_schema",
    "schema",
    "strict",
    "json",
    "regex",
    "choice",
    "grammar",
    "json_object",
    "x",
    "",
    "$ref",
)


def valid_forms() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"response_format": {"type": kind}} for kind in ("text", "json_object")]
    for schema in schemas(6):
        form = {"name": "answer", "schema": schema, "strict": True, "description": "an answer"}
        found += [
            {"response_format": {"type": "json_schema", "json_schema": form}},
            {"structured_outputs": {"json": schema}},
        ]
    found += [{"structured_outputs": {"json": json.dumps(schemas(1)[0]), "disable_any_whitespace": True}}]
    given = {"regex": "[a-z]{2,5}", "choice": ["yes", "no"], "grammar": 'start: "a" | "b"', "json_object": True}
    found += [{"structured_outputs": {name: value}} for name, value in given.items()]
    return found + 3 * [valid_tools(choice) for choice in ("none", "auto", "required", "named", "allowed")]


def valid_tools(choice: str) -> dict[str, Any]:
    """Two tools, one of them without parameters, a choice of them, and a call of one in the conversation."""
    named = {"type": "function", "function": {"name": "lookup"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    functions = [
        {"name": "lookup", "description": "a person", "parameters": schemas(1)[0], "strict": True},
        {"name": "x"},
    ]
    call = {"id": "call_1", "type": "function", "function": {"name": "lookup", "arguments": '{"person": "Ada"}'}}
    return {
        "messages": [
            {"role": "user", "content": "Who is it?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "Ben"},
        ],
        "tools": [{"type": "function", "function": function} for function in functions],
        "tool_choice": {"named": named, "allowed": allowed}.get(choice, choice),
        "parallel_tool_calls": choice != "required",
    }


def changed(value: Any, chance: random.Random) -> Any:
    """The same value with one change at a random place."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice([*value])
        roll = chance.random()
        if roll < 0.1:
            return {name: each for name, each in value.items() if name != key}
        if roll < 0.2:
            return {**value, chance.choice(_KEYS): chance.choice((value[key], *_ODD))}
        return {**value, key: changed(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.85:
        place = chance.randrange(len(value))
        return [*value[:place], changed(value[place], chance), *value[place + chance.randint(0, 1) :]]
    if isinstance(value, str) and chance.random() < 0.5:
        place = chance.randint(0, len(value))
        return value[:place] + chance.choice('"\\()[]{}*+?|.^$\n\x00é😀a1') + value[place:]
    return chance.choice(_ODD)


def bodies(count: int) -> list[tuple[str, bytes]]:
    """So many addresses and bodies, always the same ones."""
    forms, found = valid_forms(), []
    for number in range(count):
        chance = random.Random(number)
        form: Any = {}
        for part in chance.sample(forms, 1 if chance.random() < 0.9 else 2):
            form |= part
        for _ in range(chance.randint(0, 3)):
            form = changed(form, chance)
        form = form if isinstance(form, dict) else {"response_format": form}
        chat: dict[str, Any] = {"messages": [{"role": "user", "content": "Who is it?"}]}
        paths = (("chat/completions", chat), ("completions", {"prompt": "It is"}))
        path, start = paths[0] if "tools" in form else chance.choice(paths)
        found.append((f"/v1/{path}", json.dumps({**start, "stream": chance.random() < 0.3, **form}).encode()))
    return found


@pytest.mark.parametrize("first", range(0, CASES, 100))
async def test_no_changed_format_is_a_fault_of_the_service(first: int) -> None:
    checks, found = GrammarChecks(tokenizers()), set()
    app = create_app(config(), tokenizers(), ScriptedBackend(), grammars=checks)
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://a") as http:
        for path, body in bodies(CASES)[first : first + 100]:
            answer = await http.post(path, content=body, headers=JSON, timeout=HANG_S)
            assert answer.status_code in (200, 400, 413, 422), (answer.status_code, answer.text, body[:2_000])
            found.add(answer.status_code)
            if answer.status_code != 200:
                assert answer.json()["error"]["message"], body[:2_000]
    assert {200, 400} <= found
