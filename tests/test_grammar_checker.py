"""Grammars that end, fill or block the process that compiles them, and the process that does it instead."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import pytest
from llguidance import LLMatcher

from actors import grammar_checker
from actors.decoding.grammar import GrammarVocabulary
from actors.grammar_checker import check, token_table, verdict_of
from actors.text.tokenizer import RoleTokenizer
from tests.support.deadlines import HANG_S
from tests.support.local_service import WEIGHTS

ONE_WORD = LLMatcher.grammar_from_lark('start: "yes" | "no"')
# Right recursion of 3,000 rules: a stack overflow while it is compiled.
DEEP = LLMatcher.grammar_from_lark(
    "start: r0\n" + "\n".join(f'r{i}: "a" r{i + 1} | "b" r{i + 1}' for i in range(3_000)) + '\nr3000: "c"'
)
SLOW = LLMatcher.grammar_from_json_schema({"type": "integer", "multipleOf": 999_983})  # 13 s
LARGE = LLMatcher.grammar_from_regex("a?" * 10_000)  # 0.5 GiB


@pytest.fixture(scope="module")
def table() -> bytes:
    return token_table(RoleTokenizer.load(str(WEIGHTS / "target")))


@pytest.fixture(scope="module")
def vocabulary(table: bytes) -> GrammarVocabulary:
    return grammar_checker._vocabulary(json.loads(table))


def schema(value: Any) -> str:
    return LLMatcher.grammar_from_json_schema(value)


def test_a_grammar_that_can_be_used_has_no_fault(vocabulary: GrammarVocabulary) -> None:
    assert check(vocabulary, ONE_WORD) == ""
    assert check(vocabulary, schema({"type": "object"})) == ""


def test_a_grammar_that_overflows_the_stack_is_called_too_deep(vocabulary: GrammarVocabulary) -> None:
    assert "nested too deeply" in check(vocabulary, DEEP)
    assert check(vocabulary, ONE_WORD) == ""


def test_a_grammar_that_takes_too_long_is_given_up(
    vocabulary: GrammarVocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_checker, "CHECK_S", 0.3)
    began = time.monotonic()
    assert "longer than 0.3 s" in check(vocabulary, SLOW)
    assert time.monotonic() - began < 3


def test_a_grammar_that_takes_too_much_memory_is_given_up(
    vocabulary: GrammarVocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_checker, "CHECK_BYTES", 64 << 20)
    assert "memory" in check(vocabulary, LARGE)
    assert check(vocabulary, ONE_WORD) == ""


@pytest.mark.parametrize(
    "value", [{"$ref": "#"}, {"allOf": [{"$ref": "#"}]}, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#"}}}]
)
def test_a_schema_that_nothing_satisfies_says_so(vocabulary: GrammarVocabulary, value: Any) -> None:
    assert "nothing satisfies it" in verdict_of(vocabulary, schema(value))


def test_the_process_answers_each_line_and_ends_with_its_input(table: bytes) -> None:
    lines = table + b"\n" + json.dumps(ONE_WORD).encode() + b"\n" + json.dumps("start: (").encode() + b"\n"
    command = [sys.executable, "-m", "actors.grammar_checker"]
    done = subprocess.run(command, input=lines, stdout=subprocess.PIPE, timeout=HANG_S, check=True)
    ready, fine, wrong = map(json.loads, done.stdout.splitlines())
    assert (ready, fine) == ("ready", "")
    assert wrong
