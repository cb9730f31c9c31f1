"""Tables that relate a small model's tokens to the tokens of a target with another vocabulary.

The event of a target's token t is "the text, *tokenised by the target*, continues with t". A small model's token counts
towards the first of the target's tokens that encode its text. Once the target has emitted that one, it counts towards
the following ones: then it crosses a boundary of the target's tokens. Example: if the target encodes the small token
"football" as "foot|ball", it counts towards "foot" first and, after "foot", towards "ball". All tables follow from how
each tokenizer encodes the other's tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

NOWHERE = 0  # the trie's root: no crossing token


class TokenizerAdapter(Protocol):
    """Encodes text in the middle of an answer, without the tokens that a tokenizer puts around a text.

    texts: by id the bytes of a token; None for tokens without text and for ids that are no token.
    """

    @property
    def texts(self) -> Sequence[bytes | None]: ...

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of a text, and by id the bytes of the text up to its end. Callers must not change the lists."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts."""

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of bytes that are not UTF-8; empty if the vocabulary has none for them."""

    def restart(self, text: str) -> int:
        """Number of leading characters whose tokens no following text can change."""


@dataclass(frozen=True, slots=True)
class SpecialTokenMatches:
    """Special tokens of a small model, matched with the target by their role or content.

    same: by the target's id the small model's ids of the same event (ends of a text; added tokens of equal content).
    shown: by id the text of added tokens that the target writes as text (the end of the thinking).
    """

    same: Mapping[int, tuple[int, ...]]
    shown: Mapping[int, bytes]


@dataclass(frozen=True, slots=True, eq=False)
class RaggedArray:
    """Lists of different lengths in one array: list i is flat[starts[i]:starts[i + 1]]."""

    starts: Ids
    flat: Ids

    @classmethod
    def of(cls, owners: Ids, items: Ids, count: int) -> RaggedArray:
        """`count` lists from pairs (owner, item); each list keeps the order of its items."""
        order = np.argsort(owners, kind="stable")
        starts = np.zeros(count + 1, np.int64)
        np.cumsum(np.bincount(owners, minlength=count), out=starts[1:])
        return cls(starts, items[order])

    def __getitem__(self, index: int) -> Ids:
        return self.flat[self.starts[index] : self.starts[index + 1]]

    def take(self, indices: Ids) -> tuple[Ids, Ids]:
        """The items of several lists in one array, and the length of each list."""
        begin = self.starts[indices]
        counts = self.starts[indices + 1] - begin
        within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.flat[np.repeat(begin, counts) + within], counts


@dataclass(frozen=True, slots=True, eq=False)
class Trie:
    """A trie of the small model's tokens that the target encodes as several tokens.

    A node stands for a proper prefix of such encodings. tokens, nexts: by node the small model's tokens with this
    prefix, and the target's token with which each continues.
    """

    edge_nodes: Ids
    edge_tokens: Ids
    edge_children: Ids
    tokens: RaggedArray
    nexts: RaggedArray

    @classmethod
    def of(cls, ids: Ids, encodings: RaggedArray) -> Trie:
        """ids [n]: small tokens, ascending. encodings: the target's encoding of each, two tokens or more."""
        lengths = np.diff(encodings.starts)
        at, nodes, count = np.zeros(len(ids), np.int64), np.arange(len(ids)), 1
        edges: list[tuple[Ids, Ids, Ids]] = []
        owners, tokens, nexts = [_NONE], [_NONE], [_NONE]
        for depth in range(int(lengths.max(initial=1)) - 1):
            nodes = nodes[lengths[nodes] > depth + 1]
            begin = encodings.starts[nodes]
            pairs = at[nodes] << 32 | encodings.flat[begin + depth]
            found, child = np.unique(pairs, return_inverse=True)
            children = count + np.arange(len(found))
            edges.append((found >> 32, found & 0xFFFFFFFF, children))
            at[nodes] = children[child]
            count += len(found)
            owners.append(at[nodes])
            tokens.append(ids[nodes])
            nexts.append(encodings.flat[begin + depth + 1])
        owner = np.concatenate(owners)
        joined = [np.concatenate(parts) for parts in zip(*edges, strict=True)] if edges else [_NONE] * 3
        return cls(
            joined[0],
            joined[1],
            joined[2],
            RaggedArray.of(owner, np.concatenate(tokens), count),
            RaggedArray.of(owner, np.concatenate(nexts), count),
        )


_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class TableArrays:
    """The tables as arrays, in the form in which they are cached on disk.

    image [role width]: the target's token towards which a small token counts, -1 for none. event_starts, event_tokens:
    by token of the target the small tokens whose probabilities add up to it, ascending; empty for no guidance.
    edge_*, crossing_*: the `Trie`. texts [2]: the number of the target's text tokens, and of those that are one small
    token, byte for byte.
    """

    image: Ids
    event_starts: Ids
    event_tokens: Ids
    edge_nodes: Ids
    edge_tokens: Ids
    edge_children: Ids
    crossing_starts: Ids
    crossing_tokens_flat: Ids
    crossing_nexts: Ids
    texts: Ids

    def columns(self) -> dict[str, NDArray[Any]]:
        """The arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class Tables:
    """The tables of a target and a small model with another vocabulary."""

    def __init__(self, arrays: TableArrays) -> None:
        self.arrays = arrays
        self.image = arrays.image
        self.events = RaggedArray(arrays.event_starts, arrays.event_tokens)
        self.crossing_tokens = RaggedArray(arrays.crossing_starts, arrays.crossing_tokens_flat)
        self.nexts = RaggedArray(arrays.crossing_starts, arrays.crossing_nexts)

    @cached_property
    def _edges(self) -> dict[tuple[int, int], int]:
        arrays = self.arrays
        pairs = zip(arrays.edge_nodes.tolist(), arrays.edge_tokens.tolist(), strict=True)
        return dict(zip(pairs, arrays.edge_children.tolist(), strict=True))

    @cached_property
    def represented_by(self) -> Ids:
        """[target width]: the token of the target whose event a token uses.

        It is the token itself, unless no small token counts towards it: then it uses the event of the first small
        token of its text.
        """
        starts = self.arrays.event_starts
        represented_by = np.arange(len(starts) - 1)
        guided = np.flatnonzero(np.diff(starts))
        image = self.image[self.arrays.event_tokens[starts[guided]]]
        represented_by[guided] = np.where(image < 0, guided, image)
        return represented_by

    def walk(self, tokens: Sequence[int]) -> int:
        """The node of small tokens whose encoding has the proper prefix `tokens`; NOWHERE if there are none."""
        node = NOWHERE
        for token in tokens:
            node = self._edges.get((node, token), NOWHERE)
            if node == NOWHERE:
                break
        return node

    @property
    def coverage(self) -> float:
        """Share of the target's text tokens that are one small token, byte for byte."""
        texts, equal = self.arrays.texts.tolist()
        return float(equal / max(1, texts))

    @property
    def beginnings(self) -> int:
        """Number of token sequences of the target that are a proper prefix of a small token's encoding."""
        return len(self.arrays.edge_children)


def build_tables(target: TokenizerAdapter, role: TokenizerAdapter, matches: SpecialTokenMatches, width: int) -> Tables:
    """Build the tables of one pair. width: of the target's rows; ids beyond it have no event.

    Tokens with equal bytes match before any tokenizer is asked: some tokens are not the encoding of their own text.
    """
    small_texts: dict[int, bytes] = {v: text for v, text in enumerate(role.texts) if text}
    large_texts = {t: text for t, text in enumerate(target.texts[:width]) if text}
    small_ids = _by_bytes(small_texts)
    ours = _encodings(small_texts | dict(matches.shown), target, _by_bytes(large_texts))
    theirs = _encodings(large_texts, role, small_ids)
    added = [*matches.shown, *(v for same in matches.same.values() for v in same)]
    image = np.full(max(len(role.texts), *(v + 1 for v in added), 1), -1, np.int64)
    with_text = large_texts.keys()  # excludes the unknown token, which means no text
    ids = np.array(sorted(v for v, encoding in ours.items() if encoding and with_text >= {*encoding}), np.int64)
    image[ids] = [ours[v][0] for v in ids.tolist()]
    members = RaggedArray.of(image[ids], ids, width)
    owners, tokens = [np.repeat(np.arange(width), np.diff(members.starts))], [members.flat]
    lone = [t for t in large_texts if members.starts[t] == members.starts[t + 1] and theirs[t]]
    owners.append(np.array(lone, np.int64))
    tokens.append(np.array([theirs[t][0] for t in lone], np.int64))
    for t, same in matches.same.items():
        owners.append(np.full(len(same), t))
        tokens.append(np.array(same, np.int64))
        image[list(same)] = t
    events = RaggedArray.of(np.concatenate(owners), np.concatenate(tokens), width)
    several = [v for v in ids.tolist() if len(ours[v]) > 1]
    flat = np.array([t for v in several for t in ours[v]], np.int64)
    starts = np.cumsum([0, *(len(ours[v]) for v in several)]).astype(np.int64)
    trie = Trie.of(np.array(several, np.int64), RaggedArray(starts, flat))
    texts = np.array([len(large_texts), sum(text in small_ids for text in large_texts.values())])
    edges = trie.edge_nodes, trie.edge_tokens, trie.edge_children
    crossing = trie.tokens.starts, trie.tokens.flat, trie.nexts.flat
    return Tables(TableArrays(image, events.starts, events.flat, *edges, *crossing, texts))


def _by_bytes(texts: Mapping[int, bytes]) -> dict[bytes, int]:
    """The id of each text. If a letter and a byte token have the same bytes, the higher id counts: byte tokens come
    first in the vocabularies that have both."""
    return {text: id_ for id_, text in sorted(texts.items())}


def _encodings(
    texts: Mapping[int, bytes], adapter: TokenizerAdapter, by_bytes: Mapping[bytes, int]
) -> dict[int, Sequence[int]]:
    """Encode the texts of tokens in another vocabulary. by_bytes: its ids by their bytes."""
    encoded: dict[int, Sequence[int]] = {}
    remaining: list[tuple[int, str]] = []
    for id_, data in texts.items():
        if (same := by_bytes.get(data)) is not None:
            encoded[id_] = (same,)
            continue
        try:
            remaining.append((id_, data.decode()))
        except UnicodeDecodeError:
            encoded[id_] = adapter.encode_bytes(data)
    ids = adapter.encode_batch([text for _, text in remaining])
    encoded.update(zip((id_ for id_, _ in remaining), ids, strict=True))
    return encoded
