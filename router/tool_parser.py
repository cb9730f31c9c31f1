"""Reads tool calls from the text of an answer while it grows.

What is read depends on the text alone, never on how it was cut into pieces: a streamed answer and a whole one are read
by the same code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from actors.text.tool_formats import NAME_PATTERN, ToolFormat

_HEADER_LIMIT = 256  # characters between the mark of a call and its JSON
_IN_KEY = r'(?:[^"\\]|\\.){0,256}'
# Possessive: a text of spaces takes no long search.
_KEY = re.compile(rf'\s*+(?:,\s*+)?+("{_IN_KEY}")\s*+:\s*+(?=\S)')
_KEY_BEGUN = re.compile(rf'\s*+(?:,\s*+)?+(?:"{_IN_KEY}(?:\\|"\s*+(?::\s*+)?+)?)?')
_OBJECT_END = re.compile(r"\s*\}")
_OUTSIDE, _INSIDE = re.compile(r'["{}\[\]]'), re.compile(r'["\\]')  # where a string begins, and where it may end
_SCALAR_END = re.compile(r"[\s,}\]]")
_SPACE = re.compile(r"\s*")
_ARGUMENTS = ("arguments", "parameters")


class Piece(NamedTuple):
    """A part of an answer: content, or of call number `call` its name, a part of its arguments, or its failure.

    name: a call begins. broken: a call whose arguments are no JSON object; the text is all that the model wrote of it.
    """

    text: str
    call: int | None = None
    name: str | None = None
    broken: bool = False


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One whole call. arguments: JSON."""

    name: str
    arguments: str


@dataclass
class ParsedAnswer:
    """The content and the calls of a whole answer. The text of a broken call is content."""

    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> ParsedAnswer:
        """Put the pieces of an answer together."""
        answer, calls = cls(), dict[int, ToolCall]()
        for piece in pieces:
            if piece.call is None:
                answer.content += piece.text
            elif piece.broken:
                calls.pop(piece.call, None)
                answer.content += piece.text
            elif piece.name is not None:
                calls[piece.call] = ToolCall(piece.name, piece.text)
            else:
                begun = calls[piece.call]
                calls[piece.call] = ToolCall(begun.name, begun.arguments + piece.text)
        answer.calls = list(calls.values())
        return answer


class _JsonEnd:
    """Finds the end of one JSON value in a growing text, without checking it."""

    def __init__(self, start: int) -> None:
        self._at, self._depth, self._string, self._first = start, 0, False, True
        self._scalar = False

    def find(self, text: str) -> int:
        """The index behind the value; -1 if the text does not have it yet."""
        if self._first and self._at < len(text):
            self._first, self._scalar = False, text[self._at] not in '"{['
        if self._scalar:
            found = _SCALAR_END.search(text, self._at)
            self._at = len(text)
            return found.start() if found else -1
        while found := (_INSIDE if self._string else _OUTSIDE).search(text, self._at):
            mark = found.group()
            if mark == "\\":
                if found.end() == len(text):
                    self._at = found.start()
                    return -1
                self._at = found.end() + 1
                continue
            self._at = found.end()
            if mark == '"':
                self._string = not self._string
            else:
                self._depth += 1 if mark in "{[" else -1
            if not self._string and self._depth <= 0:
                return self._at
        self._at = len(text)
        return -1


_Reading: TypeAlias = Generator[Piece | None, None, bool]  # yields None where it needs more text


class ToolParser:
    """Reads one answer: `push` its content piece by piece, then `finish`. Both return what became certain.

    declared: names of the request's functions. A call without a mark counts only if its function is one of them. most:
    number of calls to read; further ones are left out.
    """

    def __init__(self, format_: ToolFormat, declared: Collection[str], most: int | None = None) -> None:
        self._format, self._declared, self._most = format_, frozenset(declared), most
        self._text = ""  # not yet turned into pieces; begins with the call that is being read
        self._behind_mark = 0  # where in it the mark of that call ends
        self._marked = False
        self._begun = self._broken = 0  # calls
        self._ended = False
        self._reading = self._read()

    @property
    def called(self) -> bool:
        """True if there is a call whose arguments are whole, or not yet broken."""
        return self._begun > self._broken

    def push(self, text: str) -> list[Piece]:
        """Add a piece of the content."""
        self._text += text
        return self._run()

    def finish(self) -> list[Piece]:
        """End the answer; return what was held back."""
        self._ended = True
        return self._run()

    def _run(self) -> list[Piece]:
        pieces = []
        for piece in self._reading:
            if piece is None:
                break
            # A broken call is none of those that may be read.
            if piece.call is None or self._most is None or piece.call - self._broken < self._most:
                pieces.append(piece)
            elif piece.broken:
                pieces.append(Piece(piece.text))
        return [piece for piece in pieces if piece.text or piece.name]

    def _read(self) -> _Reading:
        at_start = True
        while (yield from self._content(at_start)):
            at_start = False
            while (yield from self._call()) and (yield from self._further()):
                pass
        return True

    def _more(self) -> _Reading:
        """Wait for more text. False if there is none."""
        if not self._ended:
            yield None
            return True
        return False

    def _content(self, at_start: bool) -> _Reading:
        """Content up to a call. False at the end of the answer."""
        if at_start and self._format.bare:
            while (at := self._space()) == len(self._text) and (yield from self._more()):
                pass
            if self._text.startswith(self._format.bare, at):
                self._begin(0, at, False)
                return True
        while True:
            found = [(at, mark) for mark in self._format.begins if (at := self._text.find(mark)) >= 0]
            if found:
                at, mark = min(found)
                shown = len(self._text[:at].rstrip())
                yield Piece(self._text[:shown])
                self._begin(shown, at + len(mark), True)
                return True
            shown = len(self._text[: len(self._text) - self._partial_mark()].rstrip())
            yield Piece(self._text[:shown])
            self._text = self._text[shown:]
            if not (yield from self._more()):
                yield Piece(self._text)
                return False

    def _partial_mark(self) -> int:
        """Length of the longest end of the text that is the beginning of a mark."""
        longest = max(map(len, self._format.begins), default=1) - 1
        for length in range(min(longest, len(self._text)), 0, -1):
            if any(mark.startswith(self._text[-length:]) for mark in self._format.begins):
                return length
        return 0

    def _further(self) -> _Reading:
        """Skip what stands behind a call. True if another call follows, False if content does."""
        form = self._format
        while True:
            at = self._space()
            left = self._text[at:]
            candidates = (*form.begins, *form.again, *form.rest)
            if any(each != left and each.startswith(left) for each in candidates) and (yield from self._more()):
                continue
            mark = max((each for each in candidates if left.startswith(each)), key=len, default="")
            if mark in form.begins or mark in form.again:
                marked = mark in form.begins
                self._begin(at, at + (len(mark) if marked else 0), marked or not form.bare)
                return True
            if not mark:
                self._text = self._text if left else ""
                return False
            self._text = left[len(mark) :]

    def _begin(self, start: int, behind_mark: int, marked: bool) -> None:
        self._text, self._behind_mark, self._marked = self._text[start:], behind_mark - start, marked

    def _space(self) -> int:
        found = _SPACE.match(self._text)
        return found.end() if found else 0

    def _call(self) -> _Reading:
        """One call from its mark on. False if it is none."""
        at = self._behind_mark
        while self._text.find("{", at) < 0 and len(self._text) - at <= _HEADER_LIMIT and (yield from self._more()):
            pass
        brace = self._text.find("{", at, at + _HEADER_LIMIT + 1)
        header = self._format.header.fullmatch(self._text, at, brace) if brace >= 0 else None
        if header is None:
            return (yield from self._give_up(at))
        name = header.groupdict().get("name")
        if name is None:
            return (yield from self._object(brace + 1))
        end = yield from self._stream(name, brace)
        self._text = self._text[end:]
        return end > 0

    def _object(self, at: int) -> _Reading:
        """A call as one JSON object, of which `at` is behind the brace."""
        name: str | None = None
        held: str | None = None  # arguments that stand before the name, or are no plain object
        done = False
        while True:
            while (
                (key := _KEY.match(self._text, at)) is None
                and _OBJECT_END.match(self._text, at) is None
                and _KEY_BEGUN.fullmatch(self._text, at)
                and (yield from self._more())
            ):
                pass
            label = _loaded(key[1]) if key else None
            if key is None or label is None:
                end = _OBJECT_END.match(self._text, at)
                if end:
                    at = end.end()
                break
            at = key.end()
            if label in _ARGUMENTS and name is not None and held is None and not done and self._text[at] == "{":
                at = yield from self._stream(name, at)
                if not at:
                    return False
                done = True
                continue
            value = _JsonEnd(at)
            while (stop := value.find(self._text)) < 0 and (yield from self._more()):
                pass
            raw, at = self._text[at:stop] if stop >= 0 else "", stop if stop >= 0 else len(self._text)
            if done:
                continue
            if label == "name":
                name = _loaded(raw)
                if not self._is_name(name):
                    return (yield from self._give_up(at))
            elif label in _ARGUMENTS:
                held = _plain_arguments(raw)
                if held is None:
                    return (yield from self._give_up(at))
        if not done:
            if held is None and self._marked and end:
                held = "{}"
            if name is None or held is None or not end:
                return (yield from self._give_up(at))
            yield Piece("", self._begun, name)
            yield Piece(held, self._begun)
            self._begun += 1
        self._text = self._text[at:]
        return True

    def _is_name(self, name: Any) -> bool:
        return (
            isinstance(name, str)
            and re.fullmatch(NAME_PATTERN, name) is not None
            and (self._marked or name in self._declared)
        )

    def _stream(self, name: str, at: int) -> Generator[Piece | None, None, int]:
        """Pass on the arguments that begin at `at`. Returns the index behind them; 0 if they are no JSON object."""
        number, sent, value = self._begun, at, _JsonEnd(at)
        self._begun += 1
        yield Piece("", number, name)
        while (stop := value.find(self._text)) < 0:
            yield Piece(self._text[sent:], number)
            sent = len(self._text)
            if not (yield from self._more()):
                break
        if stop < 0 or not isinstance(_loaded(self._text[at:stop]), dict):
            self._broken += 1
            yield Piece(self._text[sent : stop if stop >= 0 else len(self._text)], number)
            yield from self._give_up(stop if stop >= 0 else len(self._text), number)
            return 0
        yield Piece(self._text[sent:stop], number)
        return stop

    def _give_up(self, at: int, call: int | None = None) -> _Reading:
        """Turn the text up to `at`, which is no call, into content. call: its number, if it has begun."""
        yield Piece(self._text[:at], call, broken=call is not None)
        self._text = self._text[at:]
        return False


def _loaded(text: str) -> Any:
    """A JSON value; None for text that is none."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _plain_arguments(raw: str) -> str | None:
    """The JSON of an object: as it is, within a string, or null for an empty one; None for anything else."""
    value = _loaded(raw)
    if value is None and raw == "null":
        return "{}"
    if isinstance(value, str):
        raw, value = value, _loaded(value)
    return raw if isinstance(value, dict) else None
