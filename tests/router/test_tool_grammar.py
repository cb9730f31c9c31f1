"""The grammar of answers that call tools, in each form, with marks that are tokens and marks that are text."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from actors.config import ToolParserName
from actors.decoding.grammar import GrammarError, GrammarVocabulary
from actors.text.tokenizer import RoleTokenizer
from actors.text.tool_formats import FORMATS
from actors.text.vocabularies import VocabularyRegistry
from router.backend import BadRequest
from router.grammars import GrammarChecks
from router.schema import ChatRequest, parse
from router.tool_grammar import answer_grammar
from router.tools import tool_use
from tests.support.scripted_service import config
from tests.support.tokenizers import MARKS, byte_level, role_tokenizer

ALL_MARKS = tuple(dict.fromkeys(mark for form in FORMATS.values() for mark in form.marks))
INTEGER = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
ONE, TWO = ("f", '{"a": 1}'), ("g", '{"a": 2}')


@functools.cache
def tokenizer(with_marks: bool) -> RoleTokenizer:
    return role_tokenizer(byte_level((*MARKS, *(ALL_MARKS if with_marks else ()))))


@functools.cache
def vocabulary(with_marks: bool) -> GrammarVocabulary:
    return VocabularyRegistry({"target": tokenizer(with_marks)}).grammars("target")


def tool(name: str, parameters: Any = INTEGER, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def grammar(form: ToolParserName, with_marks: bool, **fields: Any) -> tuple[str, str]:
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": [tool("f"), tool("g")], **fields}
    request = parse(ChatRequest, body)
    tools = tool_use(request, config(models={"target": {"tool_parser": form}}).models.target, tokenizer(with_marks))
    assert tools is not None
    return answer_grammar(request, tools, tokenizer(with_marks))


def legal(text: str, with_marks: bool, made: str) -> bool:
    """True if a text is a whole answer in a grammar."""
    matcher = vocabulary(with_marks).matcher(made)
    try:
        for token in tokenizer(with_marks).encode(text):
            matcher.take(token)
    except GrammarError:
        return False
    end = vocabulary(with_marks).end
    return bool(matcher.legal()[end // 32] >> (end % 32) & 1)


@pytest.mark.parametrize("with_marks", [True, False])
@pytest.mark.parametrize("form", FORMATS)
def test_required_calls_are_the_whole_answer(form: ToolParserName, with_marks: bool) -> None:
    made, param = grammar(form, with_marks, tool_choice="required")
    write = FORMATS[form].write_all
    assert param == "tools"
    assert legal(write([ONE]), with_marks, made)
    assert legal("\n\n" + write([ONE, TWO, ONE]), with_marks, made)
    assert not legal("No.", with_marks, made)
    assert not legal("", with_marks, made)
    assert not legal(write([("h", '{"a": 1}')]), with_marks, made)
    assert not legal(write([("f", '{"b": 1}')]), with_marks, made)
    assert not legal(write([("f", '{"a": "1"}')]), with_marks, made)


@pytest.mark.parametrize("form", FORMATS)
def test_one_call_is_one_call(form: ToolParserName) -> None:
    write = FORMATS[form].write_all
    made, _ = grammar(form, True, tool_choice="required", parallel_tool_calls=False)
    assert legal(write([TWO]), True, made)
    assert not legal(write([ONE, TWO]), True, made)
    named, _ = grammar(form, True, tool_choice={"type": "function", "function": {"name": "g"}})
    assert legal(write([TWO]), True, named)
    assert not legal(write([ONE]), True, named)
    assert not legal(write([TWO, TWO]), True, named)


def test_an_automatic_choice_has_no_grammar() -> None:
    assert grammar("hermes", True) == ("", "")
    assert grammar("hermes", False, tools=[tool("f", strict=True)]) == ("", "")


def test_strict_functions_are_obeyed_where_the_model_chooses_to_call() -> None:
    write = FORMATS["hermes"].write_all
    made, param = grammar("hermes", True, tools=[tool("f", strict=True), tool("g", {})])
    assert param == "tools"
    assert legal("No call, just text: {}", True, made)
    assert legal("I ask. " + write([ONE, ("g", '{"b": [1]}')]), True, made)
    assert not legal(write([("f", '{"b": 1}')]), True, made)


@pytest.mark.parametrize(
    ("fields", "content"),
    [
        ({"response_format": {"type": "json_object"}}, '{"b": 2}'),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": INTEGER}}}, '{"a": 3}'),
        ({"structured_outputs": {"regex": "ab+"}}, "abb"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "no"),
        ({"structured_outputs": {"grammar": 'start: "x" end\nend: "y"'}}, "xy"),
    ],
)
@pytest.mark.parametrize("form", ["hermes", "llama3_json"])
def test_an_answer_with_a_form_is_that_form_or_calls(form: ToolParserName, fields: Any, content: str) -> None:
    made, param = grammar(form, True, **fields)
    assert param in fields
    mark = "<|python_tag|>" if form == "llama3_json" else ""
    assert legal(content, True, made)
    assert legal(mark + FORMATS[form].write_all([ONE]), True, made)
    assert not legal("Neither.", True, made)


def test_a_form_of_the_content_does_not_hinder_a_required_call() -> None:
    made, _ = grammar("hermes", True, tool_choice="required", response_format={"type": "json_object"})
    assert legal(FORMATS["hermes"].write_all([ONE]), True, made)
    assert not legal("{}", True, made)


def test_functions_that_are_not_strict_may_have_unknown_keywords() -> None:
    odd = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True, "items": {"type": "integer"}}}}
    made, _ = grammar("hermes", True, tools=[tool("f", odd)], tool_choice="required")
    assert legal(FORMATS["hermes"].write_all([("f", '{"a": [1, 1]}')]), True, made)
    strict, _ = grammar("hermes", True, tools=[tool("f", odd, strict=True)], tool_choice="required")
    with pytest.raises(GrammarError, match="uniqueItems"):
        vocabulary(True).matcher(strict)


def test_a_function_without_parameters_takes_an_empty_object() -> None:
    made, _ = grammar("hermes", True, tools=[tool("f", None)], tool_choice="required")
    assert legal(FORMATS["hermes"].write_all([("f", "{}")]), True, made)
    assert not legal(FORMATS["hermes"].write_all([ONE]), True, made)


def test_parameters_must_be_an_objects_schema() -> None:
    with pytest.raises(BadRequest, match="parameters of f"):
        grammar("hermes", True, tools=[tool("f", {"type": "array"})], tool_choice="required")


async def test_grammars_with_special_tokens_pass_the_check() -> None:
    checks = GrammarChecks({"target": tokenizer(True), "guider": tokenizer(True), "guider_base": tokenizer(True)})
    try:
        for form in FORMATS:
            await checks.require(*grammar(form, True, tool_choice="required")[:1], "target", "tools")
    finally:
        await checks.stop()
