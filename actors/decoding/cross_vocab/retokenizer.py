"""Keeps a small model's true tokens of a text that a target with another vocabulary writes, token by token.

When the text grows, only its tail is encoded again: from the last place before which no following text can change a
token. So a new piece of text removes a few tokens at most (a rollback of the KV cache) and adds new ones. Example,
with the target's tokens as pushed, and the small model's tokens as (removed, added):

    push(" foot")     (0, [" foot"])           tokens: " foot"
    push("ball")      (1, [" football"])       tokens: " football"
    push("s are")     (1, [" footballs", " are"])   tokens: " footballs" " are"

Now the tail is " are": text before a space does not change any more.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.decoding.cross_vocab.boundary_tokens import CrossingTokenFinder, CrossingTokens
from actors.decoding.cross_vocab.tables import TokenizerAdapter

LOOK_BACK = 2  # boundaries of the small model's tokens before its newest whose rows may have crossing tokens
KEPT_ROWS = LOOK_BACK + 3  # rows that a replica keeps for them: a rollback rarely removes more than three tokens
_LONGEST_TAIL = 512  # characters; a longer word is cut
_KEPT_TOKENS, _MAX_TOKENS = 64, 256  # tokens whose ends are kept: above the second number all but the first go


@dataclass(frozen=True, slots=True)
class CrossedBoundaries:
    """The earlier boundaries whose rows contribute crossing tokens to the newest row.

    Example: the small model has 5 tokens, and a token from the boundary after the third of them crosses the text's
    end. Then first is 3, path holds tokens 3 and 4 (from 0), and crossing_tokens belong to rows 3, 4 and 5.
    """

    first: int  # tokens before the earliest of these rows
    path: tuple[int, ...]  # the small model's tokens from there to the newest row
    crossing_tokens: tuple[CrossingTokens | None, ...]  # of each row up to the newest; None for none
    partial: bool  # True if the text ends within a character: the newest row lies before the text's end


class AddedTokenMatcher:
    """Finds added tokens in a text. A tokenizer does so before it splits anything else."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = ids
        self._longest = max(map(len, ids), default=0)
        self._any = re.compile("|".join(re.escape(text) for text in sorted(ids, key=len, reverse=True)))
        self._beginnings = frozenset(text[:end] for text in ids for end in range(1, len(text)))

    def find(self, text: str, searched: int) -> tuple[int, int, int] | None:
        """Start, end and id of the first added token that ends after the `searched` leading characters."""
        found = self._any.search(text, max(0, searched - self._longest)) if self._ids else None
        return None if found is None else (found.start(), found.end(), self._ids[found.group()])

    def incomplete_from(self, text: str) -> int:
        """Index from which the end of the text may be the beginning of an added token; its length if none."""
        for count in range(min(self._longest - 1, len(text)), 0, -1):
            if text[-count:] in self._beginnings:
                return len(text) - count
        return len(text)


class IncrementalRetokenizer:
    """The small model's tokens of a text since the prompt.

    Positions count from the end of the prompt. A hard boundary is a place across which no tokens merge: the end of the
    prompt, a special token, or bytes that are not UTF-8. Every push returns the number of tokens to remove from the
    end, and the tokens to add then.
    """

    def __init__(self, adapter: TokenizerAdapter, added_tokens: AddedTokenMatcher | None = None) -> None:
        """added_tokens: those of the small model that may occur in the text."""
        self._adapter, self._added_tokens = adapter, added_tokens or AddedTokenMatcher({})
        self._base = 0  # tokens before the first one in _ids
        self._ids: list[int] = []
        self._ends: list[int] = [0]  # bytes of the text up to each token of _ids, and to the end of the last
        self._floor = 0  # tokens before the last hard boundary
        self._tail, self._tail_tokens = "", 0  # text that may be encoded again, and its number of tokens
        self._incomplete = b""  # the first bytes of an incomplete character
        self._target_tokens: list[int] = []  # the newest since the last hard boundary
        self._marks: list[int] = [0]  # bytes of the text up to each of these, and to the end of the last

    def __len__(self) -> int:
        return self._base + len(self._ids)

    @property
    def floor(self) -> int:
        """Tokens before the last hard boundary."""
        return self._floor

    @property
    def pending(self) -> bytes:
        """The first bytes of a character that is incomplete."""
        return self._incomplete

    def fork(self) -> IncrementalRetokenizer:
        """A copy, to which drafts can be pushed."""
        other = IncrementalRetokenizer.__new__(IncrementalRetokenizer)
        other.__dict__.update(self.__dict__)
        other._ids, other._ends = self._ids[:], self._ends[:]
        other._target_tokens, other._marks = self._target_tokens[:], self._marks[:]
        return other

    def push(self, token: int, data: bytes) -> tuple[int, list[int]]:
        """Add a token of the target with the bytes `data`; return the number of tokens to remove, and those to add."""
        before = kept = len(self)
        end = self._marks[-1] + len(data)
        self._target_tokens.append(token)
        self._marks.append(end)
        data, self._incomplete = self._incomplete + data, b""
        while data:
            try:
                text, bad, data = data.decode(), b"", b""
            except UnicodeDecodeError as error:
                text, bad, rest = data[: error.start].decode(), data[error.start : error.end], data[error.end :]
                if error.end == len(data) and error.reason == "unexpected end of data":
                    self._incomplete, bad = bad, b""
                data = rest
            if text:
                kept = min(kept, self._add_text(text))
            if bad:
                self._add_bytes(bad)
        if not self._target_tokens:  # a hard boundary within the token
            self._marks = [end]
        self._drop_oldest()
        return before - kept, self._since(kept)

    def push_special(self, token: int, data: bytes = b"") -> tuple[int, list[int]]:
        """Add a special token of the small model with the bytes `data`, and a hard boundary after it."""
        before = len(self)
        if self._incomplete:  # the character stays incomplete
            bad, self._incomplete = self._incomplete, b""
            self._add_bytes(bad)
        self._add([token], [self._ends[-1] + len(data)])
        self._add_boundary()
        return 0, self._since(before)

    def boundaries(self, crossing_finder: CrossingTokenFinder) -> CrossedBoundaries | None:
        """The earlier boundaries from which tokens cross the text's end; None if the newest row needs no other."""
        newest, partial = len(self), bool(self._incomplete)
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
            return crossing_finder.between(tuple(self._target_tokens[at:]))
        return crossing_finder.within(tuple(self._target_tokens[at - 1 :]), end - self._marks[at - 1]) if at else None

    def _add_text(self, text: str) -> int:
        """Add text; return the number of tokens before the first that changed."""
        kept, rest = len(self), self._tail + text
        while (found := self._added_tokens.find(rest, len(self._tail))) is not None:
            start, end, token = found
            kept = min(kept, self._encode(rest[:start]))
            self._add([token], [self._ends[-1] + len(rest[start:end].encode())])
            self._add_boundary()
            rest = rest[end:]
        return min(kept, self._encode(rest)) if rest else kept

    def _encode(self, tail: str) -> int:
        """Replace the tail by `tail`; return the number of tokens before the first that changed."""
        self._tail = tail
        ids, ends = self._adapter.encode(tail)
        before, most = self._tail_tokens, min(self._tail_tokens, len(ids))
        begin, same = len(self._ids) - before, 0
        while same < most and self._ids[begin + same] == ids[same]:
            same += 1
        start = self._ends[begin]
        if same < before:
            del self._ids[begin + same :], self._ends[begin + same + 1 :]
        self._add(ids[same:], [start + end for end in ends[same:]])
        self._tail_tokens = len(ids)
        self._cut()
        return self._base + begin + same

    def _cut(self) -> None:
        """Shorten the tail by the leading text whose tokens no following text can change."""
        settled = self._adapter.restart(self._tail)
        if settled and (begun := self._added_tokens.incomplete_from(self._tail)) < len(self._tail):
            # If it becomes an added token, the text before it will be encoded by itself.
            settled = min(settled, self._adapter.restart(self._tail[:begun]))
        if not settled and len(self._tail) > _LONGEST_TAIL:
            settled = len(self._tail)
        if not settled:
            return
        rest = self._tail[settled:]
        start = self._ends[-1] - len(rest.encode())
        at = bisect_left(self._ends, start)
        if self._ends[at] == start:  # otherwise a token spans the cut
            self._tail, self._tail_tokens = rest, len(self._ids) - at

    def _add_bytes(self, data: bytes) -> None:
        """Add bytes that are not UTF-8."""
        ids = self._adapter.encode_bytes(data)
        if len(ids) == len(data):
            self._add(ids, range(self._ends[-1] + 1, self._ends[-1] + 1 + len(data)))
        elif ids:
            self._add(ids, [self._ends[-1]] * (len(ids) - 1) + [self._ends[-1] + len(data)])
        else:
            self._ends[-1] += len(data)
        self._settle()

    def _add_boundary(self) -> None:
        """Add a hard boundary of both models' tokens."""
        self._settle()
        self._target_tokens, self._marks = [], [self._ends[-1]]

    def _settle(self) -> None:
        """Add a hard boundary of the small model's tokens."""
        self._floor, self._tail, self._tail_tokens = len(self), "", 0

    def _add(self, ids: Sequence[int], ends: Sequence[int]) -> None:
        self._ids += ids
        self._ends += ends

    def _since(self, position: int) -> list[int]:
        return self._ids[position - self._base :]

    def _drop_oldest(self) -> None:
        spare = len(self._ids) - max(self._tail_tokens, _KEPT_TOKENS)
        if len(self._ids) > _MAX_TOKENS and spare > 0:
            del self._ids[:spare], self._ends[:spare]
            self._base += spare
        if len(self._target_tokens) > _MAX_TOKENS:
            del self._target_tokens[:-_KEPT_TOKENS], self._marks[: -_KEPT_TOKENS - 1]
