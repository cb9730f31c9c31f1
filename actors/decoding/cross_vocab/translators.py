"""How each small model reads what the target says, token by token, and what it would read of a draft.

With the target's own text tokens a small model reads one token for one; with another vocabulary it reads the text.
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

_CONTEXT = 3  # of the target's tokens that a draft's text is spelled together with


@dataclass(frozen=True, slots=True)
class DraftTranslation:
    """What a role reads of drafts, as far as it reads them one after another.

    tokens: behind its stream. ends: how many of them are read before each row, none before the first; straddles: of
    each row.
    """

    tokens: tuple[int, ...]
    ends: tuple[int, ...]
    boundaries_by_row: tuple[CrossedBoundaries | None, ...]

    def truncated(self, rows: int) -> DraftTranslation:
        """Of fewer drafts: so many rows."""
        if rows == len(self.ends):
            return self
        return DraftTranslation(self.tokens[: self.ends[rows - 1]], self.ends[:rows], self.boundaries_by_row[:rows])


NO_DRAFTS = DraftTranslation((), (0,), (None,))  # where nothing is guessed, and each row speaks for itself


class TokenTranslator(Protocol):
    """Extends one role's stream by what the target says."""

    def append(self, token: int) -> None:
        """The target said `token`."""

    def append_forced(self, ours: Sequence[int], theirs: Sequence[int]) -> None:
        """A text came that nobody chose: in the target's ids, and in this role's."""

    def retokenize(self, ours: Sequence[int], theirs: Sequence[int], marker: str) -> None:
        """The text ends with a marker, which the role spells as `theirs`."""

    def translate_drafts(self, drafts: Sequence[int]) -> DraftTranslation:
        """What it would read of these tokens of the target."""

    def drafts_in_target(self, drafted: Sequence[int]) -> list[int]:
        """What this role drafted, in the target's tokens."""

    def oldest_needed_row(self) -> int | None:
        """The earliest position whose row a next row may need; None if each speaks for itself."""


class OneToOneTranslator:
    """Reads one token for one, or several where it has no such added token."""

    def __init__(self, mapping: VocabularyMap, stream: Stream) -> None:
        self._mapping, self._stream = mapping, stream

    def append(self, token: int) -> None:
        """The target said `token`."""
        self._stream.append(self._mapping.tokens(token))

    def append_forced(self, ours: Sequence[int], theirs: Sequence[int]) -> None:
        """A text came that nobody chose."""
        self._stream.append(theirs)

    def retokenize(self, ours: Sequence[int], theirs: Sequence[int], marker: str) -> None:
        """A role with a token of its own for the marker reads that token instead."""
        if tuple(self._stream.tokens[-len(theirs) :]) != tuple(theirs):
            self._stream.replace_tail(sum(len(self._mapping.tokens(token)) for token in ours), theirs)

    def translate_drafts(self, drafts: Sequence[int]) -> DraftTranslation:
        """Its own ids of them, until one is not a single token."""
        if not drafts:
            return NO_DRAFTS
        tokens = _one_for_one(drafts, self._mapping.to_role)
        return DraftTranslation(tuple(tokens), tuple(range(len(tokens) + 1)), (None,) * (len(tokens) + 1))

    def drafts_in_target(self, drafted: Sequence[int]) -> list[int]:
        """In the target's ids, until it has none."""
        return _one_for_one(drafted, self._mapping.to_primary)

    def oldest_needed_row(self) -> int | None:
        """Each row speaks for itself."""
        return None


def _one_for_one(tokens: Sequence[int], theirs: Ids) -> list[int]:
    """Tokens in another model's ids, until it has none."""
    mapped: list[int] = []
    for token in tokens:
        if theirs[token] < 0:
            break
        mapped.append(int(theirs[token]))
    return mapped


@dataclass(frozen=True, eq=False)
class Alignment:
    """A small model of another vocabulary, as the target's sessions need it.

    special: the target's tokens that are one token of the small model by what they are. texts: what the target's tokens
    say; None for a token that says nothing. from_special: the small model's tokens that are one of the target's so.
    shown: the texts of its other added tokens.
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
        """The small tokens that straddle what the target said."""
        return CrossingTokenFinder(self.tables, self.target, self.said, self.role)

    @cached_property
    def added_tokens(self) -> AddedTokenMatcher:
        """What the small model reads as one token, whatever stands around it."""
        return AddedTokenMatcher({text.decode(): id_ for id_, text in self.shown.items()})

    def said(self, token: int) -> bytes:
        """The bytes that the target's `token` adds to the text."""
        return (self.texts[token] if token < len(self.texts) else None) or b""


class RetokenizingTranslator:
    """Reads the text: keeps the stream the true tokens of what was said since the prompt."""

    def __init__(self, alignment: Alignment, stream: Stream) -> None:
        self._alignment, self._stream = alignment, stream
        self._prompt = len(stream)
        self._retokenizer = IncrementalRetokenizer(alignment.role, alignment.added_tokens)
        self._said: list[int] = []  # the target's newest tokens since the last that was no text

    def append(self, token: int) -> None:
        """The target said `token`."""
        self._stream.replace_tail(*self._push(self._retokenizer, token))
        self._said = [] if token in self._alignment.special else [*self._said[1 - _CONTEXT :], token]

    def append_forced(self, ours: Sequence[int], theirs: Sequence[int]) -> None:
        """A text came that nobody chose: it is read as any other."""
        for token in ours:
            self.append(token)

    def retokenize(self, ours: Sequence[int], theirs: Sequence[int], marker: str) -> None:
        """Texts that are a token of its own are read so anyway."""

    def translate_drafts(self, drafts: Sequence[int]) -> DraftTranslation:
        """The true tokens of them, until one takes back another."""
        reading, crossing_finder = (
            self._retokenizer.fork() if drafts else self._retokenizer,
            self._alignment.crossing_finder,
        )
        tokens: list[int] = []
        ends, boundaries_by_row = [0], [self._placed(reading.boundaries(crossing_finder))]
        for draft in drafts:
            back, news = self._push(reading, draft)
            if back:
                break
            tokens += news
            ends.append(len(tokens))
            boundaries_by_row.append(self._placed(reading.boundaries(crossing_finder)))
        return DraftTranslation(tuple(tokens), tuple(ends), tuple(boundaries_by_row))

    def drafts_in_target(self, drafted: Sequence[int]) -> list[int]:
        """The target's tokens of the text that was drafted, as they follow what it said."""
        text = b""
        for token in drafted:
            if token in self._alignment.from_special:
                return [*self._encoded(text), self._alignment.from_special[token]]
            if not (said := self._text(token)):
                break
            text += said
        return self._encoded(text)

    def oldest_needed_row(self) -> int | None:
        """The row of the earliest boundary that may have straddlers."""
        return self._prompt + max(self._retokenizer.floor, len(self._retokenizer) - LOOK_BACK) - 1

    def _text(self, token: int) -> bytes | None:
        texts = self._alignment.role.texts
        return (texts[token] if token < len(texts) else None) or self._alignment.shown.get(token)

    def _push(self, reading: IncrementalRetokenizer, token: int) -> tuple[int, list[int]]:
        special = self._alignment.special.get(token)
        if special is not None:
            return reading.special(special, self._alignment.said(token))
        return reading.push(token, self._alignment.said(token))

    def _placed(self, boundaries: CrossedBoundaries | None) -> CrossedBoundaries | None:
        return None if boundaries is None else replace(boundaries, first=boundaries.first + self._prompt)

    def _encoded(self, data: bytes) -> list[int]:
        """Text that follows what was said, in the target's tokens; what cannot be read yet is left out."""
        text, target = data.decode(errors="ignore"), self._alignment.target
        if self._retokenizer.pending or not text:
            return []  # in the middle of a character the guider does not know how it began
        before = b"".join(self._alignment.said(token) for token in self._said)
        try:
            ids = target.encode(before.decode() + text)[0]
        except UnicodeDecodeError:
            return target.encode(text)[0]
        known = len(self._said)
        return ids[known:] if ids[:known] == self._said else target.encode(text)[0]


def translator_for(mapping: VocabularyMap | Alignment, stream: Stream) -> TokenTranslator:
    """The reader of a role's stream, which holds its prompt."""
    return (
        RetokenizingTranslator(mapping, stream)
        if isinstance(mapping, Alignment)
        else OneToOneTranslator(mapping, stream)
    )
