"""Tool calls in the text of an answer, in each form, however the text is cut into pieces."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.config import ToolParserName
from actors.text.tool_formats import FORMATS
from router.tool_parser import ParsedAnswer, Piece, ToolCall, ToolParser

BEGIN, END, SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
ALL_BEGIN, ALL_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
F, G = ToolCall("f", '{"a": 1}'), ToolCall("g", "{}")
NESTED = ToolCall("f", '{"a": "}]\\"{\\\\", "b": [{"c": null}]}')

Case = tuple[ToolParserName, str, str, list[ToolCall]]  # form, text, and the content and calls that it holds
CALLS: list[Case] = [
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", [F]),
    (
        "hermes",
        'Let me see.\n\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
        "Let me see.",
        [F, G],
    ),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call> Done.', " Done.", [F]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}', "", [F]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}', "", [F]),
    ("hermes", '<tool_call>{"name": "g"}</tool_call>', "", [G]),
    ("hermes", '<tool_call>{"name": "g", "arguments": null}</tool_call>', "", [G]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [F]),
    ("hermes", f'<tool_call>{{"name": "f", "arguments": {NESTED.arguments}}}</tool_call>', "", [NESTED]),
    ("hermes", '<tool_call>{"name": "other", "arguments": {}}</tool_call>', "", [ToolCall("other", "{}")]),
    ("llama3_json", '{"name": "f", "parameters": {"a": 1}}', "", [F]),
    ("llama3_json", '\n\n{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}', "", [F, G]),
    ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [F]),
    ("llama3_json", '{"type": "function", "name": "f", "parameters": {"a": 1}}', "", [F]),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]', "", [F]),
    (
        "mistral",
        'So [TOOL_CALLS][{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}, {"name": "g", "arguments": {}}]',
        "So",
        [F, G],
    ),
    ("mistral_args", '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]abcdefghi[ARGS]{}', "", [F, G]),
    ("mistral_args", '[TOOL_CALLS]f{"a": 1}', "", [F]),
    ("mistral", '[TOOL_CALLS] [TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]', "", [F]),
    (
        "deepseek_v3",
        f'{ALL_BEGIN}{BEGIN}function{SEPARATOR}f\n```json\n{{"a": 1}}\n```{END}\n'
        f"{BEGIN}function{SEPARATOR}g\n```json\n{{}}\n```{END}{ALL_END}",
        "",
        [F, G],
    ),
    (
        "deepseek_v31",
        f'I ask.{ALL_BEGIN}{BEGIN}f{SEPARATOR}{{"a": 1}}{END}{BEGIN}g{SEPARATOR}{{}}{END}{ALL_END}',
        "I ask.",
        [F, G],
    ),
    ("json", '{"name": "f", "arguments": {"a": 1}}', "", [F]),
    ("json", '[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "parameters": {}}]', "", [F, G]),
]
NO_CALLS: list[tuple[ToolParserName, str]] = [
    ("hermes", "x < y, and a <tool_ call"),
    ("hermes", "Use <tool_call> for calls.\n"),
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": oops}}\n</tool_call>'),
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": NaN}}\n</tool_call>'),
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": 1'),
    ("hermes", '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>'),
    ("hermes", '<tool_call>\n{"name": "not a name", "arguments": {}}\n</tool_call>'),
    ("hermes", '<tool_call>\n{"arguments": {}}\n</tool_call>'),
    ("hermes", "<tool_call>" + " " * 400 + '{"name": "f"}'),
    ("llama3_json", '{"name": "Ada", "parameters": {}}'),
    ("llama3_json", '{"name": "f"}'),
    ("llama3_json", '{"answer": {"name": "f", "parameters": {}}}'),
    ("mistral", "[TOOL_CALLS] none"),
    ("deepseek_v3", f"{ALL_BEGIN}nothing{ALL_END}"),
    ("json", "[1, 2]"),
    ("json", "Ada is a person: {}"),
    ("json", '{"name": "f", "arguments": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}}"),
]


def read(form: ToolParserName, pieces: Iterable[str], most: int | None = None) -> list[Piece]:
    parser = ToolParser(FORMATS[form], ("f", "g"), most)
    return [each for piece in pieces for each in parser.push(piece)] + parser.finish()


@pytest.mark.parametrize(("form", "text", "content", "calls"), CALLS)
def test_calls_are_read_wherever_the_text_is_cut(
    form: ToolParserName, text: str, content: str, calls: list[ToolCall]
) -> None:
    expected = ParsedAnswer(content, calls)
    assert ParsedAnswer.of(read(form, text)) == expected
    for at in range(len(text) + 1):
        assert ParsedAnswer.of(read(form, (text[:at], text[at:]))) == expected, text[:at]


@pytest.mark.parametrize(("form", "text"), NO_CALLS)
def test_text_that_is_no_call_stays_content(form: ToolParserName, text: str) -> None:
    assert ParsedAnswer.of(read(form, (text,))) == ParsedAnswer(text, [])
    for at in range(0, min(len(text), 120)):
        assert ParsedAnswer.of(read(form, (text[:at], text[at:]))).content == text


def test_arguments_are_passed_on_as_they_grow() -> None:
    parser = ToolParser(FORMATS["hermes"], ("f",))
    assert parser.push('Well. <tool_call>\n{"name": "f", ') == [Piece("Well.")]
    assert parser.push('"arguments": {"a') == [Piece("", 0, "f"), Piece('{"a', 0)]
    assert parser.push('": 1') == [Piece('": 1', 0)]
    assert parser.push("}") == [Piece("}", 0)]
    assert parser.push("}\n</tool_call>") == []
    assert parser.called
    assert parser.finish() == []


def test_only_text_that_may_be_a_mark_is_held_back() -> None:
    parser = ToolParser(FORMATS["hermes"], ("f",))
    assert parser.push("a <tool") == [Piece("a")]
    assert parser.push("s> b") == [Piece(" <tools> b")]


def test_further_calls_are_left_out_where_one_is_asked_for() -> None:
    text = FORMATS["hermes"].write_all([("f", "{}"), ("g", "{}")])
    assert ParsedAnswer.of(read("hermes", (text,), most=1)).calls == [ToolCall("f", "{}")]


def test_many_spaces_within_a_call_are_read_in_linear_time() -> None:
    """It took minutes when each push tried every split of the spaces."""
    parser = ToolParser(FORMATS["hermes"], {"f"})
    pieces = parser.push("<tool_call>{")
    for _ in range(1_000):
        pieces += parser.push(8 * " ")
    pieces += [*parser.push('"name": "g", "arguments": {}}</tool_call>'), *parser.finish()]
    assert ParsedAnswer.of(pieces).calls == [G]


def test_a_streamed_call_that_breaks_loses_no_text_and_takes_no_place() -> None:
    parser = ToolParser(FORMATS["hermes"], {"f"}, most=1)
    broken = '{"name": "f", "arguments": {"a": 1,}}'
    good = json.dumps({"name": "f", "arguments": {"a": 1}})
    pieces = [*parser.push(f"<tool_call>{broken}</tool_call><tool_call>{good}</tool_call>"), *parser.finish()]
    assert "".join(piece.text for piece in pieces if piece.call == 0 and not piece.broken) == '{"a": 1,}'
    assert [piece.name for piece in pieces if piece.call == 1 and piece.name] == ["f"]


def test_a_broken_call_counts_as_none() -> None:
    parser = ToolParser(FORMATS["hermes"], ("f",))
    parser.push('<tool_call>{"name": "f", "arguments": {"a": }}</tool_call>')
    assert not parser.called


FRAGMENTS = [
    *('{"name": "f", ', '"arguments": ', '{"a": 1}', "}", "{", '"', "\\", ", ", "\n", "[", "]", ";", "f", "x", "null"),
    *("```json\n", "function", '"parameters": {', "[ARGS]", "[CALL_ID]"),
    *{mark for form in FORMATS.values() for mark in (*form.marks, *form.begins)},
]


@settings(max_examples=300, deadline=None)
@given(
    form=st.sampled_from(sorted(FORMATS)),
    parts=st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=12),
    cuts=st.lists(st.integers(0, 200), max_size=6),
)
def test_any_text_is_read_alike_whole_and_in_pieces(form: ToolParserName, parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(places)]
    whole = ParsedAnswer.of(read(form, (text,)))
    assert ParsedAnswer.of(read(form, pieces)) == whole
    assert all(isinstance(json.loads(call.arguments), dict) for call in whole.calls)


@settings(max_examples=150, deadline=None)
@given(
    form=st.sampled_from(sorted(FORMATS)),
    arguments=st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.booleans(), max_size=3), max_size=3),
)
def test_what_a_form_writes_is_read_back(form: ToolParserName, arguments: list[dict[str, object]]) -> None:
    calls = [ToolCall("f", json.dumps(each)) for each in arguments]
    if calls:
        text = FORMATS[form].write_all([(call.name, call.arguments) for call in calls])
        assert ParsedAnswer.of(read(form, text)) == ParsedAnswer("", calls)
