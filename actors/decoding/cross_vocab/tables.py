"""Which of a small model's tokens mean which token of a target with another vocabulary, as arrays.

The event of a target's token t is "the text goes on, *tokenised by the target*, with t". A small model's token counts
towards the first of the target's tokens that spell it, and, once that one was emitted, towards the next ones: it
straddles a boundary of the target. All of it follows from how each tokenizer spells the other's tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

NOWHERE = 0  # the trie's root: no straddler


class TokenizerAdapter(Protocol):
    """How one tokenizer spells text, without the marks that it puts around a text.

    texts: by id the bytes that a token stands for; None for tokens without a text, and for ids that are no token.
    """

    @property
    def texts(self) -> Sequence[bytes | None]: ...

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of a text, and the bytes of it up to the end of each; neither may be changed."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts."""

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of bytes that are no text; empty where the vocabulary has none for them."""

    def restart(self, text: str) -> int:
        """Characters of a text whose tokens stay as they are, whatever follows."""


@dataclass(frozen=True, slots=True)
class SpecialTokenMatches:
    """Tokens of a small model that are not text to the target, matched by what they are.

    same: by the target's id the ids that are the same event (the ends of a text; an added token of the same content).
    shown: the texts, by id, of added tokens that the target spells out (the end of the thinking).
    """

    same: Mapping[int, tuple[int, ...]]
    shown: Mapping[int, bytes]


@dataclass(frozen=True, slots=True, eq=False)
class RaggedArray:
    """Lists of different lengths, end to end: list i is flat[starts[i]:starts[i + 1]]."""

    starts: Ids
    flat: Ids

    @classmethod
    def of(cls, owners: Ids, items: Ids, count: int) -> RaggedArray:
        """From pairs; each list keeps the order of its items."""
        order = np.argsort(owners, kind="stable")
        starts = np.zeros(count + 1, np.int64)
        np.cumsum(np.bincount(owners, minlength=count), out=starts[1:])
        return cls(starts, items[order])

    def __getitem__(self, index: int) -> Ids:
        return self.flat[self.starts[index] : self.starts[index + 1]]

    def take(self, indices: Ids) -> tuple[Ids, Ids]:
        """The items of many lists end to end, and how many are of each."""
        begin = self.starts[indices]
        counts = self.starts[indices + 1] - begin
        within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.flat[np.repeat(begin, counts) + within], counts


@dataclass(frozen=True, slots=True, eq=False)
class Trie:
    """Tokens of a small model that the target spells with several tokens, by the first few of these.

    A node of the trie stands for a proper beginning of spellings. tokens, nexts: per node the small model's tokens
    that begin so, and the target's token that each goes on with.
    """

    edge_nodes: Ids
    edge_tokens: Ids
    edge_children: Ids
    tokens: RaggedArray
    nexts: RaggedArray

    @classmethod
    def of(cls, ids: Ids, spellings: RaggedArray) -> Trie:
        """ids [n]: small tokens, ascending; spellings: of each of them in the target's tokens, two or more."""
        lengths = np.diff(spellings.starts)
        at, nodes, count = np.zeros(len(ids), np.int64), np.arange(len(ids)), 1
        edges: list[tuple[Ids, Ids, Ids]] = []
        owners, tokens, nexts = [_NONE], [_NONE], [_NONE]
        for depth in range(int(lengths.max(initial=1)) - 1):
            nodes = nodes[lengths[nodes] > depth + 1]
            begin = spellings.starts[nodes]
            pairs = at[nodes] << 32 | spellings.flat[begin + depth]
            found, child = np.unique(pairs, return_inverse=True)
            children = count + np.arange(len(found))
            edges.append((found >> 32, found & 0xFFFFFFFF, children))
            at[nodes] = children[child]
            count += len(found)
            owners.append(at[nodes])
            tokens.append(ids[nodes])
            nexts.append(spellings.flat[begin + depth + 1])
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
    """What is worth keeping on disk.

    image [role width]: the target's token that a small token counts towards, -1 for none. events: per target's token
    the small tokens whose probabilities add up to it, ascending; empty where guidance has nothing to say.
    texts [2]: how many text tokens the target has, and how many of them are one small token, byte for byte.
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
        """By name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class Tables:
    """A small model's vocabulary as a target of another family sees it."""

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
        """[target width]: where no small token counts towards a token, so that it is heard by its first small token,
        the one that this small token counts towards; else the token itself."""
        starts = self.arrays.event_starts
        represented_by = np.arange(len(starts) - 1)
        heard = np.flatnonzero(np.diff(starts))
        image = self.image[self.arrays.event_tokens[starts[heard]]]
        represented_by[heard] = np.where(image < 0, heard, image)
        return represented_by

    def walk(self, tokens: Sequence[int]) -> int:
        """The node of small tokens whose spelling properly begins with `tokens`; NOWHERE if there are none."""
        node = NOWHERE
        for token in tokens:
            node = self._edges.get((node, token), NOWHERE)
            if node == NOWHERE:
                break
        return node

    @property
    def coverage(self) -> float:
        """Share of the target's text tokens that are one small token, byte for byte."""
        texts, exact = self.arrays.texts.tolist()
        return float(exact / max(1, texts))

    @property
    def beginnings(self) -> int:
        """Texts of the target's tokens that some small token begins with and goes on."""
        return len(self.arrays.edge_children)


def build_tables(target: TokenizerAdapter, role: TokenizerAdapter, roles: SpecialTokenMatches, width: int) -> Tables:
    """The tables of one pair. width: of the target's rows; ids beyond it have no event.

    An exact match of bytes stands above what the tokenizer makes of a text: some tokens do not spell themselves.
    """
    small_texts: dict[int, bytes] = {v: text for v, text in enumerate(role.texts) if text}
    large_texts = {t: text for t, text in enumerate(target.texts[:width]) if text}
    small_ids = _by_bytes(small_texts)
    ours = _spellings(small_texts | dict(roles.shown), target, _by_bytes(large_texts))
    theirs = _spellings(large_texts, role, small_ids)
    added = [*roles.shown, *(v for same in roles.same.values() for v in same)]
    image = np.full(max(len(role.texts), *(v + 1 for v in added), 1), -1, np.int64)
    said = large_texts.keys()  # not the token for what it cannot spell: nobody means that
    ids = np.array(sorted(v for v, spelling in ours.items() if spelling and said >= {*spelling}), np.int64)
    image[ids] = [ours[v][0] for v in ids.tolist()]
    members = RaggedArray.of(image[ids], ids, width)
    owners, tokens = [np.repeat(np.arange(width), np.diff(members.starts))], [members.flat]
    lone = [t for t in large_texts if members.starts[t] == members.starts[t + 1] and theirs[t]]
    owners.append(np.array(lone, np.int64))
    tokens.append(np.array([theirs[t][0] for t in lone], np.int64))
    for t, same in roles.same.items():
        owners.append(np.full(len(same), t))
        tokens.append(np.array(same, np.int64))
        image[list(same)] = t
    events = RaggedArray.of(np.concatenate(owners), np.concatenate(tokens), width)
    several = [v for v in ids.tolist() if len(ours[v]) > 1]
    flat = np.array([t for v in several for t in ours[v]], np.int64)
    starts = np.cumsum([0, *(len(ours[v]) for v in several)]).astype(np.int64)
    trie = Trie.of(np.array(several, np.int64), RaggedArray(starts, flat))
    exact = sum(text in small_ids for text in large_texts.values())
    return Tables(
        TableArrays(
            image,
            events.starts,
            events.flat,
            trie.edge_nodes,
            trie.edge_tokens,
            trie.edge_children,
            trie.tokens.starts,
            trie.tokens.flat,
            trie.nexts.flat,
            np.array([len(large_texts), exact]),
        )
    )


def _by_bytes(texts: Mapping[int, bytes]) -> dict[bytes, int]:
    """The id of each text. Of a letter and its byte token, which spell the same, the one with the higher id: byte
    tokens stand first in the vocabularies that have both."""
    return {text: id_ for id_, text in sorted(texts.items())}


def _spellings(
    texts: Mapping[int, bytes], adapter: TokenizerAdapter, exact: Mapping[bytes, int]
) -> dict[int, Sequence[int]]:
    """How another vocabulary spells these tokens."""
    spelled: dict[int, Sequence[int]] = {}
    asked: list[tuple[int, str]] = []
    for id_, data in texts.items():
        if (same := exact.get(data)) is not None:
            spelled[id_] = (same,)
            continue
        try:
            asked.append((id_, data.decode()))
        except UnicodeDecodeError:
            spelled[id_] = adapter.encode_bytes(data)
    ids = adapter.encode_batch([text for _, text in asked])
    spelled.update(zip((id_ for id_, _ in asked), ids, strict=True))
    return spelled
