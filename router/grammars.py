"""The grammar that a request asks for, and its compilation in a process that may die of it.

Some grammars end the process that compiles them, and failover would carry such a one from coordinator to coordinator.
So each is compiled first by `actors.grammar_checker`, in a process of its own with little memory and time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from llguidance import LLMatcher, grammar_from

from actors.api.generation import Role
from actors.grammar_checker import CHECK_S, Verdict, token_table
from actors.text.tokenizer import RoleTokenizer
from router.backend import BadRequest, Unavailable
from router.schema import ChatRequest, CompletionRequest, ResponseFormat, StructuredOutputs

log = logging.getLogger(__name__)

MAX_BYTES, MAX_DEPTH = 64 << 10, 64  # of a schema, a regex or a grammar
MAX_COUNT = 4_096  # in a schema's bounds on lengths and in repetitions: each one is a state of the parser
_COUNTS = (
    *("minItems", "maxItems", "minLength", "maxLength"),
    *("minProperties", "maxProperties", "minContains", "maxContains"),
)
_REPETITION = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}")
_KEPT = 1_024  # verdicts
_ANY_OBJECT = {"type": "object"}
_START_S = 60.0  # to start a checker with the largest vocabularies
_IMPOSSIBLE = "nothing satisfies it"


def grammar_text(request: ChatRequest | CompletionRequest) -> tuple[str, str]:
    """The grammar of the answer in llguidance's form, "" for none, and the field that asks for it. Raises BadRequest."""
    asked = [
        (field, text)
        for field, text in (
            ("response_format", _of_format(request.response_format)),
            ("structured_outputs", _of_outputs(request.structured_outputs)),
        )
        if text
    ]
    if len(asked) > 1:
        raise BadRequest("response_format and structured_outputs both say how to answer: send one", param=asked[1][0])
    field, text = asked[0] if asked else ("", "")
    return text, field


def _of_format(asked: ResponseFormat | None) -> str:
    if asked is None or asked.type == "text":
        return ""
    if asked.type == "json_object":
        return _of_schema(_ANY_OBJECT, "response_format")
    if asked.json_schema is None or asked.json_schema.schema_ is None:
        raise BadRequest("response_format.json_schema.schema is missing", param="response_format.json_schema.schema")
    return _of_schema(asked.json_schema.schema_, "response_format.json_schema.schema")


def _of_outputs(asked: StructuredOutputs | None) -> str:
    if asked is None:
        return ""
    given = [name for name in ("json_", "regex", "choice", "grammar", "json_object") if getattr(asked, name)]
    if len(given) != 1:
        raise BadRequest(
            "structured_outputs takes exactly one of json, regex, choice, grammar and json_object",
            param="structured_outputs",
        )
    if asked.json_object:
        return _of_schema(_ANY_OBJECT, "structured_outputs.json_object", asked.disable_any_whitespace)
    if asked.json_ is not None:
        return _of_schema(_parsed(asked.json_), "structured_outputs.json", asked.disable_any_whitespace)
    if asked.choice:
        pattern = "|".join(re.escape(text) for text in asked.choice)
        _check_size(pattern, "structured_outputs.choice")
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in asked.choice))
    if asked.regex:
        _check_size(asked.regex, "structured_outputs.regex")
        return LLMatcher.grammar_from_regex(asked.regex)
    assert asked.grammar is not None
    _check_size(asked.grammar, "structured_outputs.grammar")
    try:
        return grammar_from("grammar", asked.grammar)
    except ValueError as error:
        raise BadRequest(f"structured_outputs.grammar: {error}", param="structured_outputs.grammar") from None


def _parsed(schema: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(schema, dict):
        return schema
    try:
        parsed = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"structured_outputs.json is not JSON: {error}", param="structured_outputs.json") from None
    if not isinstance(parsed, dict):
        raise BadRequest("structured_outputs.json must be an object", param="structured_outputs.json")
    return parsed


def _of_schema(schema: dict[str, Any], param: str, compact: bool = False) -> str:
    options: dict[str, Any] = {"whitespace_flexible": False} if compact else {}
    return LLMatcher.grammar_from_json_schema(checked_schema(schema, param), overrides=options)


def checked_schema(schema: dict[str, Any], param: str) -> dict[str, Any]:
    """A client's JSON schema without options of llguidance's own. Raises BadRequest if it is too large."""
    text = json.dumps(schema)
    if len(text) > MAX_BYTES:
        raise BadRequest(f"{param} has {len(text)} bytes, at most {MAX_BYTES} are taken", param=param)
    for key, value in _walk(schema, param):
        if key in _COUNTS and isinstance(value, int | float) and value > MAX_COUNT:
            raise BadRequest(f"{param}: {key} is {value}, at most {MAX_COUNT} is taken", param=param)
        if key in ("$ref", "$dynamicRef") and isinstance(value, str) and not value.startswith("#"):
            raise BadRequest(f"{param}: {key} {value!r} is not within this schema: put it there", param=param)
        if key == "pattern" and isinstance(value, str):
            _check_repetitions(value, param)
    return {key: value for key, value in schema.items() if key != "x-guidance"}


def _walk(value: Any, param: str) -> Iterator[tuple[str, Any]]:
    """Every key of a schema, with its value. Raises BadRequest if it is nested too deeply."""
    pending = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise BadRequest(f"{param} is nested deeper than {MAX_DEPTH} levels", param=param)
        if isinstance(item, dict):
            for key, each in item.items():
                yield key, each
                pending.append((each, depth + 1))
        elif isinstance(item, list):
            pending += [(each, depth + 1) for each in item]


def _check_size(text: str, param: str) -> None:
    if len(text.encode()) > MAX_BYTES:
        raise BadRequest(f"{param} has {len(text.encode())} bytes, at most {MAX_BYTES} are taken", param=param)
    _check_repetitions(text, param)


def _check_repetitions(text: str, param: str) -> None:
    for match in _REPETITION.finditer(text):
        if any(int(number) > MAX_COUNT for number in match.groups() if number):
            raise BadRequest(f"{param}: {match[0]} repeats too often, at most {MAX_COUNT} times", param=param)


class GrammarChecks:
    """Compiles grammars in another process, one after another, and keeps the verdicts."""

    def __init__(self, tokenizers: Mapping[Role, RoleTokenizer]) -> None:
        self._tokenizers = tokenizers
        self._checkers: dict[Role, asyncio.subprocess.Process] = {}
        self._verdicts: OrderedDict[tuple[Role, str], Verdict] = OrderedDict()
        self._lock = asyncio.Lock()

    async def require(self, grammar: str, role: Role, param: str) -> None:
        """Raise BadRequest if a grammar cannot be used with the vocabulary of a role, and Unavailable if nobody can say."""
        verdict = self._verdicts.get((role, grammar))
        if verdict is None:
            async with self._lock:
                verdict = await self._check(grammar, role)
            self._verdicts[role, grammar] = verdict
            if len(self._verdicts) > _KEPT:
                self._verdicts.popitem(last=False)
        if verdict:
            raise BadRequest(f"{param}: {verdict}", param=param, code="unsupported_grammar")

    async def stop(self) -> None:
        """End the processes."""
        checkers, self._checkers = self._checkers, {}
        for process in checkers.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _check(self, grammar: str, role: Role) -> Verdict:
        for attempt in range(2):
            try:
                async with asyncio.timeout(_START_S):
                    process = await self._checker(role)
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(json.dumps(grammar).encode() + b"\n")
                async with asyncio.timeout(CHECK_S + 5):
                    await process.stdin.drain()
                    line = await process.stdout.readline()
                if line:
                    verdict: Verdict = json.loads(line)
                    return verdict
                log.warning("the grammar checker ended; attempt %d", attempt)
            except (OSError, TimeoutError) as error:
                log.warning("the grammar checker does not answer: %r", error)
            if (lost := self._checkers.pop(role, None)) is not None:
                with contextlib.suppress(ProcessLookupError):
                    lost.kill()
                await lost.wait()
        raise Unavailable("grammars cannot be checked now; try again later")

    async def _checker(self, role: Role) -> asyncio.subprocess.Process:
        process = self._checkers.get(role)
        if process is None or process.returncode is not None:
            pipe = asyncio.subprocess.PIPE
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "actors.grammar_checker", stdin=pipe, stdout=pipe, limit=1 << 20
            )
            self._checkers[role] = process
            assert process.stdin is not None
            assert process.stdout is not None
            table = await asyncio.to_thread(token_table, self._tokenizers[role])
            process.stdin.write(table + b"\n")
            await process.stdin.drain()
            await process.stdout.readline()  # it is ready
        return process
