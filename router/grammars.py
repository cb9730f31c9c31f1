"""The grammar that a request asks for, and its compilation in a process that may die of it.

Some grammars end the process that compiles them, and failover would carry such a one from coordinator to coordinator.
So each is compiled first by `actors.grammar_checker`, in a process of its own with little memory and time.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import Any

from llguidance import LLMatcher, grammar_from

from actors.api.generation import Role
from actors.grammar_checker import CHECK_S, Verdict, token_table
from actors.text.tokenizer import RoleTokenizer
from router.backend import MAX_MESSAGE, BadRequest, Overloaded, Unavailable, shorten
from router.schema import ChatRequest, CompletionRequest, ResponseFormat, StructuredOutputs

log = logging.getLogger(__name__)

_UNSUPPORTED = "unsupported_grammar"  # code of the errors
MAX_BYTES, MAX_DEPTH = 64 << 10, 64  # of a schema, a regex or a grammar
MAX_COUNT = 4_096  # in a schema's bounds on lengths and in repetitions: each one is a state of the parser
_COUNTS = (
    *("minItems", "maxItems", "minLength", "maxLength"),
    *("minProperties", "maxProperties", "minContains", "maxContains"),
)
# Keywords whose value has names for keys, and those whose value is no schema.
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependentRequired")
_LITERAL = ("const", "enum", "default", "examples", "example")
_REPETITION = re.compile(r"\{\s*+(\d*+)\s*+,?+\s*+(\d*+)\s*+\}")  # possessive: a text of spaces takes no long search
_MAX_GBNF = 4_096  # characters: to convert it takes time that grows with their square
_MAX_MULTIPLE = 100_000  # of multipleOf, without the zeros at its end: as many states of the parser
_ASCII_CLASSES = {"d": "[0-9]", "D": "[^0-9]", "w": "[0-9A-Za-z_]", "W": "[^0-9A-Za-z_]"}
_KEPT = 1_024  # verdicts
_PROCESSES = 2  # of one vocabulary, which each has in memory
_MOST_CHECKS = 32  # that run or wait
_ANY_OBJECT = {"type": "object"}
# Between two parts of JSON. Without a bound small models may never go on.
_WHITESPACE = r" |\n {0,8}"
_START_S = 60.0  # to start a checker with the largest vocabularies
_SLOW_S = 10.0  # for a busy machine, beside the time of a check
_EMPTY = LLMatcher.grammar_from_lark('start: "a"')


def grammar_text(request: ChatRequest | CompletionRequest) -> tuple[str, str]:
    """The grammar of the answer in llguidance's form, or "", and the field that asks for it. Raises BadRequest."""
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
    forms = ("json_", "regex", "choice", "grammar", "json_object")
    given = [name for name in forms if getattr(asked, name) not in (None, False)]  # {} and "" are forms, too
    if len(given) != 1:
        raise BadRequest(
            "structured_outputs takes exactly one of json, regex, choice, grammar and json_object",
            param="structured_outputs",
        )
    if asked.json_object:
        return _of_schema(_ANY_OBJECT, "structured_outputs.json_object", asked.disable_any_whitespace)
    if asked.json_ is not None:
        return _of_schema(_parsed(asked.json_), "structured_outputs.json", asked.disable_any_whitespace)
    if asked.choice is not None:
        _check_size("|".join(map(re.escape, asked.choice)), "structured_outputs.choice")
        words = " | ".join(json.dumps(text) for text in asked.choice)
        return _made("structured_outputs.choice", LLMatcher.grammar_from_lark, f"start: {words}")
    if asked.regex is not None:
        _check_size(asked.regex, "structured_outputs.regex")
        _check_repetitions(asked.regex, "structured_outputs.regex")
        return _made("structured_outputs.regex", LLMatcher.grammar_from_regex, _ascii_classes(asked.regex))
    assert asked.grammar is not None
    _check_size(asked.grammar, "structured_outputs.grammar")
    _check_repetitions(asked.grammar, "structured_outputs.grammar")
    if "::=" in asked.grammar and len(asked.grammar) > _MAX_GBNF:
        raise BadRequest(
            f"structured_outputs.grammar has {len(asked.grammar)} characters of GBNF, at most {_MAX_GBNF} are taken: "
            "write it in Lark",
            param="structured_outputs.grammar",
            code=_UNSUPPORTED,
        )
    return _made("structured_outputs.grammar", grammar_from, "grammar", asked.grammar)


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
    options: dict[str, Any] = {"whitespace_flexible": False} if compact else {"whitespace_pattern": _WHITESPACE}
    return _made(param, LLMatcher.grammar_from_json_schema, checked_schema(schema, param), overrides=options)


def checked_schema(schema: dict[str, Any], param: str) -> dict[str, Any]:
    """A client's JSON schema without options of llguidance's own.

    Raises BadRequest if it is too large, or has a keyword that would be passed over.
    """
    for keyword, value, siblings in _keywords(schema, param):
        if fault := _fault(keyword, value, siblings):
            raise BadRequest(f"{param}: {keyword} {fault}", param=param, code=_UNSUPPORTED)
        if keyword == "pattern" and isinstance(value, str):
            _check_repetitions(value, param)
    _check_size(json.dumps(schema), param)
    return {key: value for key, value in _with_ascii_classes(schema).items() if key != "x-guidance"}


def _made(param: str, make: Callable[..., str], *asked: Any, **options: Any) -> str:
    """Build a grammar by llguidance. Raises BadRequest for numbers and texts that it cannot take."""
    try:
        return make(*asked, **options)
    except ValueError as error:
        raise BadRequest(f"{param}: {error}", param=param, code=_UNSUPPORTED) from None


def _with_ascii_classes(schema: Any, within: str = "") -> Any:
    """The same schema with patterns that llguidance reads as JSON Schema means them. within: see `_keywords`."""
    if isinstance(schema, list):
        return [_with_ascii_classes(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    changed: dict[str, Any] = {}
    for key, value in schema.items():
        if not within and key in _LITERAL:
            changed[key] = value
        elif not within and key == "pattern" and isinstance(value, str):
            changed[key] = _ascii_classes(value)
        else:
            name = _ascii_classes(key) if within == "patternProperties" else key
            changed[name] = _with_ascii_classes(value, key if not within and key in _NAMED else "")
    return changed


def _ascii_classes(pattern: str) -> str:
    r"""A pattern in which \d and \w mean letters and digits of ASCII alone, as in ECMA 262, which JSON Schema follows.

    Those of llguidance mean letters and digits of all scripts.
    """
    parts, inside, escaped = [], False, False
    for character in pattern:
        if escaped:
            ascii_only = _ASCII_CLASSES.get(character)
            if ascii_only is None or (inside and character.isupper()):
                parts.append("\\" + character)
            else:
                parts.append(ascii_only[1:-1] if inside else ascii_only)
        elif character != "\\":
            inside = character == "[" or (inside and character != "]")
            parts.append(character)
        escaped = character == "\\" and not escaped
    return "".join(parts) + ("\\" if escaped else "")


def _fault(keyword: str, value: Any, siblings: Mapping[str, Any]) -> str:
    """The fault of a keyword of a schema, "" for none: what llguidance would take too long for, or pass over."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if keyword in _COUNTS and number and value > MAX_COUNT:
        return f"is {value}, at most {MAX_COUNT} is taken"
    if keyword == "multipleOf" and number and _significand(value) > _MAX_MULTIPLE:
        return f"is {value}, at most {_MAX_MULTIPLE} is taken, whatever its power of ten"
    if keyword in ("$ref", "$dynamicRef") and isinstance(value, str) and not value.startswith("#"):
        return f"{value!r} is not within this schema: put it there"
    if keyword == "nullable" and value is True:
        return 'is no keyword of JSON Schema: write "type": [..., "null"]'
    if keyword == "minProperties" and number:
        required = siblings.get("required")
        if value > 1 + (len(set(map(str, required))) if isinstance(required, list) else 0):
            # llguidance counts a key twice that an answer repeats
            return f"is {value}, at most one above the number of required properties is supported"
    return ""


def _significand(number: float) -> int:
    """A number's digits without the zeros at either end, as an integer."""
    digits = "".join(map(str, Decimal(repr(number)).as_tuple().digits)).rstrip("0")
    return int(digits or 0)


def _keywords(schema: dict[str, Any], param: str) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Every keyword of a schema and of the schemas in it, with its value and those beside it.

    An item lies within a keyword of _NAMED if its keys are names, of _LITERAL if it is no schema, else within "".
    Raises BadRequest if the schema is nested too deeply.
    """
    pending: list[tuple[Any, int, str]] = [(schema, 0, "")]
    while pending:
        item, depth, within = pending.pop()
        if depth > MAX_DEPTH:
            raise BadRequest(f"{param} is nested deeper than {MAX_DEPTH} levels", param=param, code=_UNSUPPORTED)
        if isinstance(item, list):
            pending += [(each, depth + 1, within if within in _LITERAL else "") for each in item]
        elif isinstance(item, dict):
            for key, each in item.items():
                if not within:
                    yield key, each, item
                inner = within if within in _LITERAL else ""
                if not within and key in (*_NAMED, *_LITERAL):
                    inner = key
                pending.append((each, depth + 1, inner))


def _check_size(text: str, param: str) -> None:
    if len(text.encode()) > MAX_BYTES:
        raise BadRequest(
            f"{param} has {len(text.encode())} bytes, at most {MAX_BYTES} are taken", param=param, code=_UNSUPPORTED
        )


def _check_repetitions(text: str, param: str) -> None:
    for match in _REPETITION.finditer(text):
        counts = [number.lstrip("0") for number in match.groups()]
        if any(len(count) > len(str(MAX_COUNT)) or int(count or 0) > MAX_COUNT for count in counts):
            raise BadRequest(
                f"{param}: {shorten(match[0], MAX_MESSAGE)} repeats too often, at most {MAX_COUNT} times",
                param=param,
                code=_UNSUPPORTED,
            )


class GrammarChecks:
    """Compiles grammars in other processes, and keeps the verdicts.

    A vocabulary has at most _PROCESSES checkers. A check goes on when the client that asked for it leaves: others may
    wait for the same one, and every answer of a checker is read by the check that asked.
    """

    def __init__(self, tokenizers: Mapping[Role, RoleTokenizer]) -> None:
        self._tokenizers = tokenizers
        self._checkers: dict[Role, list[_Checker]] = {}
        self._free: dict[Role, asyncio.Semaphore] = {}
        self._verdicts: dict[bytes, Verdict] = {}  # by a hash of role and grammar, the oldest first
        self._running: dict[bytes, asyncio.Task[Verdict]] = {}

    async def start(self, role: Role) -> None:
        """Start a checker before the first grammar needs it: that takes seconds with a large vocabulary."""
        await self.require(_EMPTY, role, "")

    async def require(self, grammar: str, role: Role, param: str) -> None:
        """Raise BadRequest if a grammar cannot be used with the vocabulary of a role.

        Raises Overloaded if too many checks are waiting, and Unavailable if no checker answers.
        """
        key = hashlib.sha256(f"{role} {grammar}".encode("utf-8", "surrogatepass")).digest()
        verdict = self._verdicts.get(key)
        if verdict is None:
            verdict = await asyncio.shield(self._checking(key, grammar, role))
        if verdict:
            raise BadRequest(f"{param}: {verdict}", param=param, code=_UNSUPPORTED)

    async def stop(self) -> None:
        """End the processes, and every check."""
        running, self._running = [*self._running.values()], {}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        checkers, self._checkers = self._checkers, {}
        for checker in [each for of_role in checkers.values() for each in of_role]:
            await checker.end()

    def _checking(self, key: bytes, grammar: str, role: Role) -> asyncio.Task[Verdict]:
        """The check of a grammar, which others may wait for already."""
        if (running := self._running.get(key)) is not None:
            return running
        if len(self._running) >= _MOST_CHECKS:
            raise Overloaded("too many grammars wait to be checked; try again later", retry_after_s=CHECK_S)
        task = self._running[key] = asyncio.create_task(self._check(grammar, role))
        task.add_done_callback(lambda done: self._checked(key, done))
        return task

    def _checked(self, key: bytes, task: asyncio.Task[Verdict]) -> None:
        self._running.pop(key, None)
        if task.cancelled() or task.exception() is not None:
            return
        self._verdicts[key] = shorten(task.result(), MAX_MESSAGE)
        if len(self._verdicts) > _KEPT:
            del self._verdicts[next(iter(self._verdicts))]

    async def _check(self, grammar: str, role: Role) -> Verdict:
        async with self._free.setdefault(role, asyncio.Semaphore(_PROCESSES)):
            for attempt in range(2):
                try:
                    checker = await self._checker(role)
                    verdict = await checker.verdict(grammar)
                except (OSError, TimeoutError, EOFError) as error:
                    log.warning("a grammar checker does not answer: %r; attempt %d", error, attempt)
                    continue
                self._checkers.setdefault(role, []).append(checker)
                return verdict
        raise Unavailable("grammars cannot be checked now; try again later")

    async def _checker(self, role: Role) -> _Checker:
        """An idle checker, or a new one. The caller gives it back."""
        idle = self._checkers.get(role)
        while idle:
            checker = idle.pop()
            if checker.process.returncode is None:  # else it was killed
                return checker
        table = await asyncio.to_thread(token_table, self._tokenizers[role])
        return await _Checker.start(table)


class _Checker:
    """A process of `actors.grammar_checker`. It is ended if it does not answer, or if its check is cancelled."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process, self._input, self._output = process, process.stdin, process.stdout

    @classmethod
    async def start(cls, table: bytes) -> _Checker:
        """A checker of the vocabulary of a token table. Raises OSError, TimeoutError or EOFError."""
        pipe = asyncio.subprocess.PIPE
        command = sys.executable, "-m", "actors.grammar_checker"
        checker = cls(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=1 << 20))
        await checker._exchange(table, _START_S)
        return checker

    async def verdict(self, grammar: str) -> Verdict:
        """The verdict on a grammar. Raises OSError, TimeoutError or EOFError."""
        verdict: Verdict = json.loads(await self._exchange(json.dumps(grammar).encode(), CHECK_S + _SLOW_S))
        return verdict

    async def end(self) -> None:
        """End the process."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self._input.close()
        await self.process.wait()

    async def _exchange(self, line: bytes, most_s: float) -> bytes:
        """Write a line, and read the answer within so many seconds."""
        try:
            async with asyncio.timeout(most_s):
                self._input.write(line + b"\n")
                await self._input.drain()
                answer = await self._output.readline()
            if not answer:
                raise EOFError("it ended")
        except BaseException:
            await self.end()
            raise
        return answer
