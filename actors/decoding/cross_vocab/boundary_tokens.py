"""Finds boundary-crossing tokens: tokens of a small model that cross the end of the target's newest token.

Such a token starts at an earlier boundary of the small model's tokens, begins with all text that the target has
written since, and continues. Example: the target wrote "foot|b" and may continue with "all". The small model has the
token "ball". Its true tokens so far are "foot|b", but its row after "foot" already gives a probability to "ball". That
probability counts towards the target's token "all". Here "ball" is the crossing token, and "all" its next token.

If the boundary is one of the target's tokens, too (`between`), the tables hold the crossing tokens. Within a token of
the target (`within`) they depend on how the target encodes both together, so they are computed when a session first
gets there, and cached.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from actors.decoding.cross_vocab.tables import NOWHERE, Ids, Tables, TokenizerAdapter

_CACHED = 4_096  # boundaries with their crossing tokens
_MOST = 512  # tokens encoded for one boundary, about 2 ms; with more, the sum over them means too little


@dataclass(frozen=True, slots=True, eq=False)
class CrossingTokens:
    """The crossing tokens of one boundary."""

    tokens: Ids  # [n], ids of the small model, ascending
    nexts: Ids  # [n], the target's token with which each of them continues
    whole: NDArray[np.bool_]  # [n], True if it ends with that token, so that a longer one may come there, too


class CrossingTokenFinder:
    """Finds the crossing tokens of a target and a small model."""

    def __init__(
        self, tables: Tables, target: TokenizerAdapter, token_bytes: Callable[[int], bytes], role: TokenizerAdapter
    ) -> None:
        """token_bytes: the bytes that a token of the target adds to the text."""
        self._tables, self._target, self._token_bytes = tables, target, token_bytes
        self._small = role.texts
        by_text = sorted((text, id_) for id_, text in enumerate(role.texts) if text)
        self._texts, self._ids = [text for text, _ in by_text], [id_ for _, id_ in by_text]
        self.between = lru_cache(_CACHED)(self._between)
        self.within = lru_cache(_CACHED)(self._within)

    def _between(self, written: tuple[int, ...]) -> CrossingTokens | None:
        """Those from a boundary of both models. written: the target's tokens since then."""
        node = self._tables.walk(written)
        if node == NOWHERE:
            return None
        begun = b"".join(map(self._token_bytes, written))
        return self._crossing(self._tables.crossing_tokens[node], self._tables.nexts[node], begun)

    def _within(self, written: tuple[int, ...], offset: int) -> CrossingTokens | None:
        """Those from a boundary of the small model `offset` bytes within the target's token written[0]."""
        whole = b"".join(map(self._token_bytes, written))
        begun = whole[offset:]
        first, last = bisect_left(self._texts, begun + b"\0"), bisect_left(self._texts, begun + b"\xff")
        if last - first > _MOST:
            return None
        found: list[int] = []
        texts: list[str] = []
        for text, id_ in zip(self._texts[first:last], self._ids[first:last], strict=True):
            try:
                texts.append((whole + text[len(begun) :]).decode())
            except UnicodeDecodeError:
                continue
            found.append(id_)
        count = len(written)
        pairs = sorted(
            (id_, ids[count])
            for id_, ids in zip(found, self._target.encode_batch(texts), strict=True)
            if len(ids) > count and tuple(ids[:count]) == written and self._target.texts[ids[count]]
        )
        if not pairs:
            return None
        tokens, nexts = np.array(pairs, np.int64).T.copy()
        return self._crossing(tokens, nexts, begun)

    def _crossing(self, tokens: Ids, nexts: Ids, begun: bytes) -> CrossingTokens:
        """begun: the text with which all of these tokens begin."""
        texts = (self._small[token] if token < len(self._small) else None for token in tokens.tolist())
        ends = [len(text or b"") - len(begun) for text in texts]
        whole = [end == len(self._token_bytes(token)) for end, token in zip(ends, nexts.tolist(), strict=True)]
        return CrossingTokens(tokens, nexts, np.array(whole, np.bool_))
