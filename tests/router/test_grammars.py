"""The grammar that a request asks for, and its check in another process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest

from actors.text.tokenizer import RoleTokenizer
from router.backend import BadRequest
from router.grammars import GrammarChecks, grammar_text
from router.schema import ChatRequest, parse
from tests.support.local_service import WEIGHTS

MESSAGES = [{"role": "user", "content": "hi"}]
OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}}


def asked(**fields: Any) -> tuple[str, str]:
    return grammar_text(parse(ChatRequest, {"messages": MESSAGES, **fields}))


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}, {"structured_outputs": None}])
def test_requests_without_a_form_have_no_grammar(fields: dict[str, Any]) -> None:
    assert asked(**fields) == ("", "")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        (schema(OBJECT), "response_format"),
        ({"structured_outputs": {"json": OBJECT}}, "structured_outputs"),
        ({"structured_outputs": {"json": json.dumps(OBJECT)}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": True}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "[a-z]{2,5}"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": ["yes", 'no "really"', "maybe|not"]}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": 'start: "a" | "b"'}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": 'root ::= "a" | "b"'}}, "structured_outputs"),
    ],
)
async def test_every_form_compiles(checks: GrammarChecks, fields: dict[str, Any], param: str) -> None:
    text, field = asked(**fields)
    assert text
    assert field == param
    await checks.require(text, "target", field)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (schema({"type": "array", "minItems": 10**9}), "minItems"),
        (schema({"type": "string", "maxLength": 10**6}), "maxLength"),
        (schema({"type": "string", "pattern": "a{1000000}"}), "repeats"),
        (schema({"$ref": "https://example.com/schema"}), "\\$ref"),
        ({"structured_outputs": {"regex": "(a{1,100000})*"}}, "repeats"),
        ({"structured_outputs": {"regex": "a" * 70_000}}, "bytes"),
        ({"structured_outputs": {"json": "{"}}, "not JSON"),
        ({"structured_outputs": {"json": OBJECT, "regex": "a"}}, "exactly one"),
        ({"structured_outputs": {}}, "exactly one"),
        ({"structured_outputs": {"choice": ["a"]}, **schema(OBJECT)}, "send one"),
        ({"response_format": {"type": "json_schema"}}, "schema is missing"),
    ],
)
def test_forms_that_are_wrong_or_too_large_are_refused_at_once(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(BadRequest, match=named):
        asked(**fields)


def test_a_deep_schema_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(80):
        deep = {"properties": {"a": deep}}
    with pytest.raises(BadRequest, match="nested"):
        asked(**schema(deep))


@pytest.fixture(scope="module")
def tokenizers() -> dict[Any, RoleTokenizer]:
    return {"target": RoleTokenizer.load(str(WEIGHTS / "target"))}


@pytest.fixture
async def checks(tokenizers: dict[Any, RoleTokenizer]) -> AsyncIterator[GrammarChecks]:
    made = GrammarChecks(tokenizers)
    yield made
    await made.stop()


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "pattern": "("}, "."),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "."),
    ],
)
async def test_unsupported_and_impossible_schemas_are_refused_with_their_keyword(
    checks: GrammarChecks, value: Any, named: str
) -> None:
    text, field = asked(**schema(value))
    with pytest.raises(BadRequest, match=named):
        await checks.require(text, "target", field)


async def test_a_grammar_that_ends_its_process_or_takes_for_ever_is_refused_and_others_go_on(
    checks: GrammarChecks,
) -> None:
    hostile = '{"grammars":[{"json_schema":{"type":"array","minItems":1000000000,"items":{"type":"integer"}}}]}'
    with pytest.raises(BadRequest):
        await checks.require(hostile, "target", "response_format")
    text, field = asked(structured_outputs={"choice": ["a", "b"]})
    await checks.require(text, "target", field)


async def test_a_checker_that_was_killed_is_started_again(checks: GrammarChecks) -> None:
    first, field = asked(structured_outputs={"choice": ["a"]})
    await checks.require(first, "target", field)
    (process,) = checks._checkers.values()
    os.kill(process.pid, signal.SIGKILL)
    second, field = asked(structured_outputs={"choice": ["b"]})
    async with asyncio.timeout(60):
        await checks.require(second, "target", field)
