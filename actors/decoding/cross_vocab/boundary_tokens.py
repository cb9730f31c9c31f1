"""Small tokens that straddle the end of what the target said, and what the target goes on with where they come.

They begin at a boundary of the small model's tokens with all that the target said since, and go on. Where that is a
boundary of the target's tokens too, the tables know them. Within one of the target's tokens they depend on how the
target spells them together with it, so they are looked for when a session comes there, and remembered.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from actors.decoding.cross_vocab.tables import NOWHERE, Ids, Tables, TokenizerAdapter

_REMEMBERED = 4_096  # places, each with its straddlers
_MOST = 512  # tokens that are spelled for one place: some 2 ms; where more begin so, a boundary says too little


@dataclass(frozen=True, slots=True, eq=False)
class CrossingTokens:
    """tokens [n]: small tokens, ascending. nexts [n]: the target's token that each of them goes on with. whole [n]:
    whether it ends with that one, so that a longer token of the target may stand there too."""

    tokens: Ids
    nexts: Ids
    whole: NDArray[np.bool_]


class CrossingTokenFinder:
    """All straddlers of a pair of vocabularies."""

    def __init__(
        self, tables: Tables, target: TokenizerAdapter, said: Callable[[int], bytes], role: TokenizerAdapter
    ) -> None:
        """said: the bytes that a token of the target adds to the text."""
        self._tables, self._target, self._said = tables, target, said
        self._small = role.texts
        known = sorted((text, id_) for id_, text in enumerate(role.texts) if text)
        self._texts, self._ids = [text for text, _ in known], [id_ for _, id_ in known]
        self._between = lru_cache(_REMEMBERED)(self._find_between)
        self._within = lru_cache(_REMEMBERED)(self._find_within)

    def between(self, said: Sequence[int]) -> CrossingTokens | None:
        """Where a small token ends with one of the target's; said: the target's tokens since."""
        return self._between(tuple(said))

    def within(self, said: Sequence[int], offset: int) -> CrossingTokens | None:
        """Where a small token ends `offset` bytes within the target's token said[0]."""
        return self._within(tuple(said), offset)

    def _find_between(self, said: tuple[int, ...]) -> CrossingTokens | None:
        node = self._tables.walk(said)
        if node == NOWHERE:
            return None
        return self._of(self._tables.crossing_tokens[node], self._tables.nexts[node], b"".join(map(self._said, said)))

    def _find_within(self, said: tuple[int, ...], offset: int) -> CrossingTokens | None:
        whole = b"".join(map(self._said, said))
        begun = whole[offset:]
        first, last = bisect_left(self._texts, begun + b"\0"), bisect_left(self._texts, begun + b"\xff")
        if last - first > _MOST:
            return None
        found: list[int] = []
        written: list[str] = []
        for text, id_ in zip(self._texts[first:last], self._ids[first:last], strict=True):
            try:
                written.append((whole + text[len(begun) :]).decode())
            except UnicodeDecodeError:
                continue
            found.append(id_)
        spelled = self._target.encode_batch(written)
        known = len(said)
        pairs = sorted(
            (id_, ids[known])
            for id_, ids in zip(found, spelled, strict=True)
            if len(ids) > known and tuple(ids[:known]) == said and self._target.texts[ids[known]]
        )
        if not pairs:
            return None
        tokens, nexts = np.array(pairs, np.int64).T.copy()
        return self._of(tokens, nexts, begun)

    def _of(self, tokens: Ids, nexts: Ids, begun: bytes) -> CrossingTokens:
        """begun: what all of these tokens begin with."""
        texts = (self._small[token] if token < len(self._small) else None for token in tokens.tolist())
        ends = [len(text or b"") - len(begun) for text in texts]
        whole = [end == len(self._said(token)) for end, token in zip(ends, nexts.tolist(), strict=True)]
        return CrossingTokens(tokens, nexts, np.array(whole, np.bool_))
