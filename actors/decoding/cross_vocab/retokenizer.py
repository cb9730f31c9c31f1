"""A small model's true tokens of a text that a target of another family writes, token by token.

Only the tail is spelled again when the text grows: from the last place before which no later text changes a token. So
a new piece of text takes back a few tokens at most (a rollback) and adds new ones.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.decoding.cross_vocab.boundary_tokens import CrossingTokenFinder, CrossingTokens
from actors.decoding.cross_vocab.tables import TokenizerAdapter

LOOK_BACK = 2  # B: boundaries of the small model's tokens, before its newest, whose rows may have straddlers
KEPT_ROWS = LOOK_BACK + 3  # rows that are kept for it: a rollback takes back three tokens at most, nearly always
_LONGEST_TAIL = 512  # characters: a longer word is not spelled again as a whole
_REMEMBERED, _ROOM = 64, 256  # tokens whose ends are remembered at least, and at most


@dataclass(frozen=True, slots=True)
class CrossedBoundaries:
    """What a row takes from the rows of earlier boundaries.

    first: tokens before the earliest of these rows. path: the tokens from there to the newest row. crossing_tokens: of
    each row and the newest; None where no token crosses. partial: whether the newest row lies before the text's end,
    which is in the middle of a character.
    """

    first: int
    path: tuple[int, ...]
    crossing_tokens: tuple[CrossingTokens | None, ...]
    partial: bool


class AddedTokenMatcher:
    """Texts that a tokenizer finds before it splits anything else: each is one token."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = ids
        self._longest = max(map(len, ids), default=0)
        self._any = re.compile("|".join(re.escape(text) for text in sorted(ids, key=len, reverse=True)))
        self._beginnings = frozenset(text[:end] for text in ids for end in range(1, len(text)))

    def find(self, text: str, known: int) -> tuple[int, int, int] | None:
        """The first that ends in what comes after `known` characters: its start, its end and its token."""
        found = self._any.search(text, max(0, known - self._longest)) if self._ids else None
        return None if found is None else (found.start(), found.end(), self._ids[found.group()])

    def begun(self, text: str) -> int:
        """Characters before the one that the text may end with the beginning of."""
        for count in range(min(self._longest - 1, len(text)), 0, -1):
            if text[-count:] in self._beginnings:
                return len(text) - count
        return len(text)


class IncrementalRetokenizer:
    """The tokens of a text since the prompt, which is a hard boundary.

    Positions count from the prompt's end. Every change answers how many tokens to take back, and which to add then.
    """

    __slots__ = (
        "_adapter",
        "_added_tokens",
        "_bad",
        "_base",
        "_ends",
        "_floor",
        "_ids",
        "_marks",
        "_said",
        "_tail",
        "_tail_tokens",
    )

    def __init__(self, adapter: TokenizerAdapter, added_tokens: AddedTokenMatcher | None = None) -> None:
        """added_tokens: those that are one token, whatever stands around them."""
        self._adapter, self._added_tokens = adapter, added_tokens or AddedTokenMatcher({})
        self._base = 0  # tokens before the first that is remembered
        self._ids: list[int] = []
        self._ends: list[int] = [0]  # bytes up to the end of each, those up to the first before them
        self._floor = 0  # tokens before the last hard boundary
        self._tail, self._tail_tokens = "", 0  # what may be spelled again, and how many tokens that is
        self._bad = b""  # the beginning of a character
        self._said: list[int] = []  # the target's tokens since the last hard boundary, the newest of them
        self._marks: list[int] = [0]  # bytes up to the end of each of these, those up to the first before them

    def __len__(self) -> int:
        return self._base + len(self._ids)

    @property
    def floor(self) -> int:
        """Tokens before the last hard boundary."""
        return self._floor

    @property
    def pending(self) -> bytes:
        """The beginning of a character whose rest is to come."""
        return self._bad

    def fork(self) -> IncrementalRetokenizer:
        """The same again, to read ahead."""
        other = IncrementalRetokenizer.__new__(IncrementalRetokenizer)
        other._adapter, other._added_tokens = self._adapter, self._added_tokens
        other._base, other._floor = self._base, self._floor
        other._ids, other._ends = self._ids[:], self._ends[:]
        other._tail, other._tail_tokens, other._bad = self._tail, self._tail_tokens, self._bad
        other._said, other._marks = self._said[:], self._marks[:]
        return other

    def push(self, token: int, data: bytes) -> tuple[int, list[int]]:
        """The target said `token`, which reads `data`: tokens to take back, and those to add."""
        before = kept = len(self)
        end = self._marks[-1] + len(data)
        self._said.append(token)
        self._marks.append(end)
        data, self._bad = self._bad + data, b""
        while data:
            try:
                text, bad, data = data.decode(), b"", b""
            except UnicodeDecodeError as error:
                text, bad, rest = data[: error.start].decode(), data[error.start : error.end], data[error.end :]
                if error.end == len(data) and error.reason == "unexpected end of data":
                    self._bad, bad = bad, b""
                data = rest
            if text:
                kept = min(kept, self._read(text))
            if bad:
                self._raw(bad)
        if not self._said:  # a hard boundary inside of the token: nothing goes on from there
            self._marks = [end]
        self._forget()
        return before - kept, self._since(kept)

    def special(self, token: int, data: bytes = b"") -> tuple[int, list[int]]:
        """A token of its own comes, after which nothing is spelled together with what was before; it reads `data`."""
        before = len(self)
        if self._bad:  # what was begun of a character will not be finished
            bad, self._bad = self._bad, b""
            self._raw(bad)
        self._add([token], [self._ends[-1] + len(data)])
        self._bound()
        return 0, self._since(before)

    def boundaries(self, crossing_finder: CrossingTokenFinder) -> CrossedBoundaries | None:
        """What the row of the newest token takes from earlier ones; None if it speaks for itself."""
        newest, partial = len(self), bool(self._bad)
        oldest = max(self._floor, newest - LOOK_BACK)
        found: list[CrossingTokens | None] = []
        for boundary in range(oldest, newest + partial):
            crossing_tokens = self._crossing_tokens(boundary, crossing_finder)
            if crossing_tokens is not None or found:
                found.append(crossing_tokens)
        if not found:
            return CrossedBoundaries(newest, (), (None,), partial) if partial else None
        if not partial:
            found.append(None)
        first = newest + 1 - len(found)
        return CrossedBoundaries(first, tuple(self._ids[first - self._base :]), tuple(found), partial)

    def _crossing_tokens(self, boundary: int, crossing_finder: CrossingTokenFinder) -> CrossingTokens | None:
        end = self._ends[boundary - self._base]
        at = bisect_left(self._marks, end)
        if at == len(self._marks):
            return None
        if self._marks[at] == end:
            return crossing_finder.between(self._said[at:])
        return crossing_finder.within(self._said[at - 1 :], end - self._marks[at - 1]) if at else None

    def _read(self, text: str) -> int:
        """Text came: how many tokens stay."""
        kept, rest = len(self), self._tail + text
        while (found := self._added_tokens.find(rest, len(self._tail))) is not None:
            start, end, token = found
            kept = min(kept, self._encode(rest[:start]))
            self._add([token], [self._ends[-1] + len(rest[start:end].encode())])
            self._bound()
            rest = rest[end:]
        return min(kept, self._encode(rest)) if rest else kept

    def _encode(self, tail: str) -> int:
        """The tail reads otherwise now: how many tokens stay."""
        self._tail = tail
        ids, ends = self._adapter.encode(tail)
        known, most = self._tail_tokens, min(self._tail_tokens, len(ids))
        begin, same = len(self._ids) - known, 0
        while same < most and self._ids[begin + same] == ids[same]:
            same += 1
        start = self._ends[begin]
        if same < known:
            del self._ids[begin + same :], self._ends[begin + same + 1 :]
        self._add(ids[same:], [start + end for end in ends[same:]])
        self._tail_tokens = len(ids)
        self._cut()
        return self._base + begin + same

    def _cut(self) -> None:
        """Nothing that comes changes the tokens before here."""
        settled = self._adapter.restart(self._tail)
        if settled and (begun := self._added_tokens.begun(self._tail)) < len(self._tail):
            settled = min(
                settled, self._adapter.restart(self._tail[:begun])
            )  # what is before it may come to stand alone
        if not settled and len(self._tail) > _LONGEST_TAIL:
            settled = len(self._tail)
        if not settled:
            return
        rest = self._tail[settled:]
        start = self._ends[-1] - len(rest.encode())
        at = bisect_left(self._ends, start)
        if self._ends[at] == start:  # else a token reaches over the place
            self._tail, self._tail_tokens = rest, len(self._ids) - at

    def _raw(self, data: bytes) -> None:
        """Bytes that are no text."""
        ids = self._adapter.encode_bytes(data)
        if len(ids) == len(data):
            self._add(ids, range(self._ends[-1] + 1, self._ends[-1] + 1 + len(data)))
        elif ids:
            self._add(ids, [self._ends[-1]] * (len(ids) - 1) + [self._ends[-1] + len(data)])
        else:
            self._ends[-1] += len(data)
        self._settle()

    def _bound(self) -> None:
        """A hard boundary, of the target's tokens too."""
        self._settle()
        self._said, self._marks = [], [self._ends[-1]]

    def _settle(self) -> None:
        """Nothing is spelled together with what was before."""
        self._floor, self._tail, self._tail_tokens = len(self), "", 0

    def _add(self, ids: Sequence[int], ends: Sequence[int]) -> None:
        self._ids += ids
        self._ends += ends

    def _since(self, position: int) -> list[int]:
        return self._ids[position - self._base :]

    def _forget(self) -> None:
        spare = len(self._ids) - max(self._tail_tokens, _REMEMBERED)
        if len(self._ids) > _ROOM and spare > 0:
            del self._ids[:spare], self._ends[:spare]
            self._base += spare
        if len(self._said) > _ROOM:
            del self._said[:-_REMEMBERED], self._marks[: -_REMEMBERED - 1]
