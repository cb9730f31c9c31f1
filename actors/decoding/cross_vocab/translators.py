"""Translates the target's tokens, and drafts of them, into each small model's token stream.

A small model with the target's text tokens gets one token for one (`OneToOneTranslator`). One with another vocabulary
gets its own tokens of the text (`RetokenizingTranslator`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

from actors.decoding.cross_vocab.boundary_tokens import CrossingTokenFinder
from actors.decoding.cross_vocab.retokenizer import (
    LOOK_BACK,
    AddedTokenMatcher,
    CrossedBoundaries,
    IncrementalRetokenizer,
)
from actors.decoding.cross_vocab.tables import Ids, Tables, TokenizerAdapter
from actors.decoding.stream import Stream
from actors.decoding.vocabulary import VocabularyMap

_CONTEXT = 3  # of the target's newest tokens that are encoded together with a draft's text


@dataclass(frozen=True, slots=True)
class DraftTranslation:
    """A role's tokens of the target's drafts, up to the first draft that would change an earlier token.

    Example: two drafts that are 1 and 2 tokens of the role: tokens (a, b, c), ends (0, 1, 3), three rows.
    """

    tokens: tuple[int, ...]  # to append to the role's stream
    ends: tuple[int, ...]  # by row the number of them before it, 0 for the first
    boundaries_by_row: tuple[CrossedBoundaries | None, ...]

    def truncated(self, rows: int) -> DraftTranslation:
        """The same for fewer drafts, with so many rows."""
        if rows == len(self.ends):
            return self
        return DraftTranslation(self.tokens[: self.ends[rows - 1]], self.ends[:rows], self.boundaries_by_row[:rows])


NO_DRAFTS = DraftTranslation((), (0,), (None,))  # one row, which needs no earlier row


class TokenTranslator(Protocol):
    """Keeps one role's token stream up with the target's answer."""

    def append(self, token: int) -> None:
        """Append a token of the target."""

    def append_forced(self, ours: Sequence[int], theirs: Sequence[int]) -> None:
        """Append a forced text, given in ids of the target and of this role."""

    def retokenize(self, ours: Sequence[int], theirs: Sequence[int], marker: str) -> None:
        """Replace a marker at the end of the text, `ours` in the target's ids, by the role's ids `theirs`."""

    def translate_drafts(self, drafts: Sequence[int]) -> DraftTranslation:
        """The role's tokens of drafts in the target's ids; the stream does not change."""

    def drafts_in_target(self, drafted: Sequence[int]) -> list[int]:
        """Tokens that this role drafted, in the target's ids."""

    def oldest_needed_row(self) -> int | None:
        """The earliest position whose row a following row may need; None if no row needs another."""


class OneToOneTranslator:
    """Appends one token for each of the target's, or several for an added token that the role lacks."""

    def __init__(self, mapping: VocabularyMap, stream: Stream) -> None:
        self._mapping, self._stream = mapping, stream

    def append(self, token: int) -> None:
        self._stream.append(self._mapping.tokens(token))

    def append_forced(self, ours: Sequence[int], theirs: Sequence[int]) -> None:
        self._stream.append(theirs)

    def retokenize(self, ours: Sequence[int], theirs: Sequence[int], marker: str) -> None:
        """Replace the marker, unless the stream ends with `theirs` already."""
        if tuple(self._stream.tokens[-len(theirs) :]) != tuple(theirs):
            self._stream.replace_tail(sum(len(self._mapping.tokens(token)) for token in ours), theirs)

    def translate_drafts(self, drafts: Sequence[int]) -> DraftTranslation:
        """The role's ids of the drafts, up to the first that is not one token."""
        if not drafts:
            return NO_DRAFTS
        tokens = _one_for_one(drafts, self._mapping.to_role)
        return DraftTranslation(tuple(tokens), tuple(range(len(tokens) + 1)), (None,) * (len(tokens) + 1))

    def drafts_in_target(self, drafted: Sequence[int]) -> list[int]:
        """The drafts in the target's ids, up to the first that it lacks."""
        return _one_for_one(drafted, self._mapping.to_primary)

    def oldest_needed_row(self) -> int | None:
        return None


def _one_for_one(tokens: Sequence[int], theirs: Ids) -> list[int]:
    """Tokens in another model's ids, up to the first without a counterpart."""
    mapped: list[int] = []
    for token in tokens:
        if theirs[token] < 0:
            break
        mapped.append(int(theirs[token]))
    return mapped


@dataclass(frozen=True, eq=False)
class Alignment:
    """A target and a small model with another vocabulary.

    special: by special token of the target the small model's equivalent (ends of a text, equal added tokens).
    texts: by token of the target its text; None for a token without text. from_special: by special token of the small
    model the target's equivalent. shown: the texts of its other added tokens.
    """

    target: TokenizerAdapter
    role: TokenizerAdapter
    tables: Tables
    special: Mapping[int, int]
    texts: Sequence[bytes | None]
    from_special: Mapping[int, int]
    shown: Mapping[int, bytes]

    @cached_property
    def crossing_finder(self) -> CrossingTokenFinder:
        """Finds the small model's boundary-crossing tokens."""
        return CrossingTokenFinder(self.tables, self.target, self.token_bytes, self.role)

    @cached_property
    def added_tokens(self) -> AddedTokenMatcher:
        """Finds the small model's added tokens in a text."""
        return AddedTokenMatcher({text.decode(): id_ for id_, text in self.shown.items()})

    def token_bytes(self, token: int) -> bytes:
        """The bytes that the target's `token` adds to the text."""
        return (self.texts[token] if token < len(self.texts) else None) or b""


class RetokenizingTranslator:
    """Retokenizes the text: the stream holds the small model's true tokens of the answer so far."""

    def __init__(self, alignment: Alignment, stream: Stream) -> None:
        self._alignment, self._stream = alignment, stream
        self._prompt = len(stream)
        self._retokenizer = IncrementalRetokenizer(alignment.role, alignment.added_tokens)
        self._recent: list[int] = []  # the target's newest tokens since its last special token

    def append(self, token: int) -> None:
        self._stream.replace_tail(*self._push(self._retokenizer, token))
        self._recent = [] if token in self._alignment.special else [*self._recent[1 - _CONTEXT :], token]

    def append_forced(self, ours: Sequence[int], theirs: Sequence[int]) -> None:
        """Append a forced text, retokenized like any other."""
        for token in ours:
            self.append(token)

    def retokenize(self, ours: Sequence[int], theirs: Sequence[int], marker: str) -> None:
        """Do nothing: `append` finds added tokens in the text."""

    def translate_drafts(self, drafts: Sequence[int]) -> DraftTranslation:
        """The true tokens of the drafts, up to the first that changes an earlier token."""
        retokenizer = self._retokenizer.fork() if drafts else self._retokenizer
        tokens: list[int] = []
        ends, boundaries_by_row = [0], [self._boundaries(retokenizer)]
        for draft in drafts:
            removed, added = self._push(retokenizer, draft)
            if removed:
                break
            tokens += added
            ends.append(len(tokens))
            boundaries_by_row.append(self._boundaries(retokenizer))
        return DraftTranslation(tuple(tokens), tuple(ends), tuple(boundaries_by_row))

    def drafts_in_target(self, drafted: Sequence[int]) -> list[int]:
        """The target's tokens of the drafted text, encoded together with its newest tokens."""
        text = b""
        for token in drafted:
            if token in self._alignment.from_special:
                return [*self._encoded(text), self._alignment.from_special[token]]
            if not (data := self._text(token)):
                break
            text += data
        return self._encoded(text)

    def oldest_needed_row(self) -> int | None:
        """The row of the earliest boundary that may have crossing tokens."""
        return self._prompt + max(self._retokenizer.floor, len(self._retokenizer) - LOOK_BACK) - 1

    def _text(self, token: int) -> bytes | None:
        texts = self._alignment.role.texts
        return (texts[token] if token < len(texts) else None) or self._alignment.shown.get(token)

    def _push(self, retokenizer: IncrementalRetokenizer, token: int) -> tuple[int, list[int]]:
        special, data = self._alignment.special.get(token), self._alignment.token_bytes(token)
        return retokenizer.push(token, data) if special is None else retokenizer.push_special(special, data)

    def _boundaries(self, retokenizer: IncrementalRetokenizer) -> CrossedBoundaries | None:
        """The crossed boundaries of the newest row, with positions in the stream."""
        boundaries = retokenizer.boundaries(self._alignment.crossing_finder)
        return None if boundaries is None else replace(boundaries, first=boundaries.first + self._prompt)

    def _encoded(self, data: bytes) -> list[int]:
        """The target's tokens of text that follows its newest tokens, without an incomplete character at the end."""
        text, target = data.decode(errors="ignore"), self._alignment.target
        if self._retokenizer.pending or not text:
            return []  # in the middle of a character the guider has not seen its beginning
        before = b"".join(self._alignment.token_bytes(token) for token in self._recent)
        try:
            ids = target.encode(before.decode() + text)[0]
        except UnicodeDecodeError:
            return target.encode(text)[0]
        count = len(self._recent)
        return ids[count:] if ids[:count] == self._recent else target.encode(text)[0]


def translator_for(mapping: VocabularyMap | Alignment, stream: Stream) -> TokenTranslator:
    """The translator for a role's stream, which holds its prompt."""
    if isinstance(mapping, Alignment):
        return RetokenizingTranslator(mapping, stream)
    return OneToOneTranslator(mapping, stream)
