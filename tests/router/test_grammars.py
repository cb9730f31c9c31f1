"""The grammar that a request asks for, and its check in another process."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from llguidance import LLMatcher

import router.grammars
from actors.decoding.grammar import GrammarVocabulary
from actors.grammar_checker import CHECK_S, verdict_of
from actors.text.tokenizer import RoleTokenizer
from actors.text.vocabularies import VocabularyRegistry
from router.api import create_app
from router.backend import BadRequest, Overloaded
from router.grammars import GrammarChecks, grammar_text
from router.schema import ChatRequest, parse
from tests.support.deadlines import HANG_S
from tests.support.local_service import WEIGHTS
from tests.support.scripted_service import ScriptedBackend, config
from tests.support.scripted_service import tokenizers as scripted_tokenizers

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
        ({"structured_outputs": {"json": {}}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": True}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False, "regex": ""}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "[a-z]{2,5}"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": ["yes", 'no "really"', "maybe|not"]}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": 'start: "a" | "b"'}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": 'root ::= "a" | "b"'}}, "structured_outputs"),
    ],
)
def test_every_form_compiles(vocabulary: GrammarVocabulary, fields: dict[str, Any], param: str) -> None:
    text, field = asked(**fields)
    assert text
    assert field == param
    assert verdict_of(vocabulary, text) == ""


@pytest.mark.parametrize(
    ("pattern", "read"),
    [
        (r"\d\D\w\W", "[0-9][^0-9][0-9A-Za-z_][^0-9A-Za-z_]"),
        (r"[\d.]\d[^\w]", "[0-9.][0-9][^0-9A-Za-z_]"),
        (r"\\d[\]\d]\.", r"\\d[\]0-9]\."),
        ("a\\", "a\\"),
    ],
)
def test_digits_and_word_characters_are_those_of_ascii(pattern: str, read: str) -> None:
    field = {"type": "string", "pattern": pattern}
    text, _ = asked(**schema({"properties": {"pattern": {"const": {"pattern": pattern}}, "a": field}}))
    sent = json.loads(text)["grammars"][0]["json_schema"]["properties"]
    assert sent == {"pattern": {"const": {"pattern": pattern}}, "a": {"type": "string", "pattern": read}}
    text, _ = asked(**schema({"patternProperties": {pattern: field}}))
    assert json.loads(text)["grammars"][0]["json_schema"]["patternProperties"] == {read: field | {"pattern": read}}


def test_digits_of_other_scripts_are_illegal(vocabulary: GrammarVocabulary) -> None:
    text, _ = asked(structured_outputs={"regex": r"\d"})
    assert vocabulary.matcher(text).legal_length(vocabulary.encode("7")) == 1
    assert vocabulary.matcher(text).legal_length(vocabulary.encode("\u1040")) == 0


def test_whitespace_between_parts_of_json_is_bounded(vocabulary: GrammarVocabulary) -> None:
    text, _ = asked(**schema(OBJECT))
    for spaces, legal in (("", True), (" ", True), ("  ", False), ("\n" + 8 * " ", True), ("\n\n", False)):
        document = vocabulary.encode('{"a":' + spaces + "1}")
        assert (vocabulary.matcher(text).legal_length(document) == len(document)) is legal
    compact, _ = asked(structured_outputs={"json": OBJECT, "disable_any_whitespace": True})
    spaced = vocabulary.encode('{"a": 1}')
    assert vocabulary.matcher(compact).legal_length(spaced) < len(spaced)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (schema({"type": "array", "minItems": 10**9}), "minItems"),
        (schema({"type": "string", "maxLength": 10**6}), "maxLength"),
        (schema({"type": "string", "pattern": "a{1000000}"}), "repeats"),
        (schema({"type": "integer", "multipleOf": 999_983}), "multipleOf"),
        (schema({"type": "number", "multipleOf": 0.0123457}), "multipleOf"),
        (schema({"type": "object", "minProperties": 2}), "minProperties"),
        (schema({"type": "string", "nullable": True}), "nullable"),
        (schema({"type": "integer", "minimum": 10**40}), "not JSON serializable"),
        (schema({"$ref": "https://example.com/schema"}), "\\$ref"),
        ({"structured_outputs": {"regex": "(a{1,100000})*"}}, "repeats"),
        ({"structured_outputs": {"regex": "a{" + 5_000 * "9" + "}"}}, "repeats"),
        ({"structured_outputs": {"grammar": "root ::= (" + 20_000 * "\n"}}, "GBNF"),
        ({"structured_outputs": {"regex": "a" * 70_000}}, "bytes"),
        ({"structured_outputs": {"json": "{"}}, "not JSON"),
        ({"structured_outputs": {"json": OBJECT, "regex": "a"}}, "exactly one"),
        ({"structured_outputs": {}}, "exactly one"),
        ({"structured_outputs": {"json_object": False}}, "exactly one"),
        ({"structured_outputs": {"json": ""}}, "not JSON"),
        ({"structured_outputs": {"grammar": " "}}, "grammar"),
        ({"structured_outputs": {"choice": ["a"]}, **schema(OBJECT)}, "send one"),
        ({"response_format": {"type": "json_schema"}}, "schema is missing"),
    ],
)
def test_forms_that_are_wrong_or_too_large_are_refused_at_once(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(BadRequest, match=named):
        asked(**fields)


@pytest.mark.parametrize(
    "value",
    [
        {"type": "object", "properties": {"maxLength": {"const": 10**6}, "pattern": {"const": "{9999}"}}},
        {"const": {"minItems": 10**9, "nullable": True}},
        {"enum": [{"$ref": "https://example.com"}]},
        {"type": "integer", "multipleOf": 86_400, "default": {"minProperties": 9}},
        {"type": "object", "properties": {"default": {"type": "string"}}, "required": ["default"], "minProperties": 2},
    ],
)
def test_names_and_values_that_look_like_keywords_are_not(value: Any) -> None:
    assert asked(**schema(value))[0]


def test_a_keyword_in_a_property_that_has_a_keywords_name_is_found() -> None:
    with pytest.raises(BadRequest, match="minLength"):
        asked(**schema({"properties": {"default": {"type": "string", "minLength": 10**9}}}))


def test_a_deep_schema_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(80):
        deep = {"properties": {"a": deep}}
    with pytest.raises(BadRequest, match="nested"):
        asked(**schema(deep))


@pytest.fixture(scope="module")
def tokenizers() -> dict[Any, RoleTokenizer]:
    return {"target": RoleTokenizer.load(str(WEIGHTS / "target"))}


@pytest.fixture(scope="module")
def vocabulary(tokenizers: dict[Any, RoleTokenizer]) -> GrammarVocabulary:
    return VocabularyRegistry(tokenizers).grammars("target")


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
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "."),
    ],
)
def test_unsupported_and_impossible_schemas_are_refused_with_their_keyword(
    vocabulary: GrammarVocabulary, value: Any, named: str
) -> None:
    assert re.search(named, verdict_of(vocabulary, asked(**schema(value))[0]))


REFUSED: list[tuple[str, Any]] = [
    *((keyword, {}) for keyword in ("not", "if", "then", "else", "contains", "propertyNames", "dependentSchemas")),
    *((keyword, 1) for keyword in ("minContains", "maxContains")),
    *((keyword, False) for keyword in ("unevaluatedItems", "unevaluatedProperties")),
    *((keyword, {"a": ["b"]}) for keyword in ("dependentRequired", "dependencies")),
    *((keyword, "#a") for keyword in ("$dynamicRef", "$dynamicAnchor", "$recursiveRef")),
    ("uniqueItems", True),
]


@pytest.mark.parametrize(("keyword", "value"), REFUSED)
def test_a_keyword_that_is_not_obeyed_is_refused_by_name(
    vocabulary: GrammarVocabulary, keyword: str, value: Any
) -> None:
    wanted = {"type": "array" if "Item" in keyword or "ontains" in keyword else "object", keyword: value}
    assert f'"{keyword}"' in verdict_of(vocabulary, asked(**schema(wanted))[0])


async def test_a_refusal_names_the_field_and_the_keyword(checks: GrammarChecks) -> None:
    text, field = asked(**schema({"not": {"type": "string"}}))
    with pytest.raises(BadRequest, match="not") as caught:
        await checks.require(text, "target", field)
    assert (caught.value.param, caught.value.code) == ("response_format", "unsupported_grammar")


# Right recursion of 3,000 rules: a stack overflow while it is compiled.
DEEP = LLMatcher.grammar_from_lark(
    "start: r0\n" + "\n".join(f'r{i}: "a" r{i + 1} | "b" r{i + 1}' for i in range(3_000)) + '\nr3000: "c"'
)
SLOW = LLMatcher.grammar_from_json_schema({"type": "integer", "multipleOf": 999_983})  # 13 s


def word(text: str) -> str:
    return LLMatcher.grammar_from_lark(f'start: "{text}"')


async def test_a_grammar_that_ends_its_process_is_refused_and_others_go_on(checks: GrammarChecks) -> None:
    await checks.require(word("a"), "target", "")
    (checker,) = checks._checkers["target"]
    with pytest.raises(BadRequest, match="nested too deeply") as caught:
        await checks.require(DEEP, "target", "structured_outputs")
    assert caught.value.param == "structured_outputs"
    await checks.require(word("b"), "target", "")
    assert checks._checkers["target"] == [checker]


@pytest.mark.slow  # CHECK_S seconds
async def test_a_grammar_that_takes_too_long_is_refused_and_delays_no_other(checks: GrammarChecks) -> None:
    await asyncio.gather(*(checks.require(word(text), "target", "") for text in ("a", "b")))
    slow = asyncio.create_task(checks.require(SLOW, "target", "response_format"))
    async with asyncio.timeout(CHECK_S):
        for text in ("c", "d", "e"):
            await checks.require(word(text), "target", "")
        assert not slow.done()
    with pytest.raises(BadRequest, match="longer than 5 s"):
        await asyncio.wait_for(slow, CHECK_S + 5)


async def test_more_checks_than_may_wait_are_refused_with_429(
    checks: GrammarChecks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router.grammars, "_MOST_CHECKS", 3)
    asked_for = [asyncio.create_task(checks.require(word(text), "target", "")) for text in "abcde"]
    outcomes = await asyncio.gather(*asked_for, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [type(None)] * 3 + [Overloaded] * 2
    await checks.require(word("d"), "target", "")


async def test_one_check_serves_all_that_ask_for_the_same_grammar(checks: GrammarChecks) -> None:
    waiting = [asyncio.create_task(checks.require(word("a"), "target", "")) for _ in range(50)]
    await asyncio.gather(*waiting)
    assert len(checks._checkers["target"]) == 1


async def test_clients_that_leave_do_not_mix_up_the_answers(checks: GrammarChecks) -> None:
    await checks.require(word("a"), "target", "")
    for number in range(4):
        bad = asyncio.create_task(checks.require(schema_grammar({"not": {"const": number}}), "target", "x"))
        good = asyncio.create_task(checks.require(word(f"n{number}"), "target", "x"))
        for _ in range(number):
            await asyncio.sleep(0)
        bad.cancel()
        await good
        with pytest.raises(BadRequest, match="not"):
            await checks.require(schema_grammar({"not": {"const": number}}), "target", "x")


async def test_a_checker_that_was_killed_is_replaced(checks: GrammarChecks) -> None:
    await checks.require(word("a"), "target", "")
    (checker,) = checks._checkers["target"]
    checker.process.kill()
    async with asyncio.timeout(HANG_S):
        await checks.require(word("b"), "target", "")


async def test_stopping_ends_every_process_and_every_check(checks: GrammarChecks) -> None:
    await checks.require(word("a"), "target", "")
    (checker,) = checks._checkers["target"]
    waiting = asyncio.create_task(checks.require(SLOW, "target", ""))
    await asyncio.sleep(0.2)
    await checks.stop()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert checker.process.returncode is not None


async def test_the_application_stops_its_checks_when_it_is_shut_down(tokenizers: dict[Any, RoleTokenizer]) -> None:
    checks = GrammarChecks(tokenizers)
    app = create_app(config(), scripted_tokenizers(), ScriptedBackend(), grammars=checks)
    async with app.router.lifespan_context(app):
        await checks.start("target")
        (checker,) = checks._checkers["target"]
    assert checker.process.returncode is not None


def schema_grammar(value: Any) -> str:
    return LLMatcher.grammar_from_json_schema(value)
