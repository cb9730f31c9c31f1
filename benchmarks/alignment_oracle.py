"""Estimates a small model's probability of a target's next token by sampling, when the two tokenise text differently.

The event of the target's token t is: the text goes on and, tokenised by the target, has t next. Its probability under
the small model is estimated from continuations. These start some of the small model's tokens before the text's end, so
that a token of it that reaches past the end has its weight: every way to spell the text's last bytes is followed,
with its probability, up to the token that passes the end; of these, each as often as its weight, continuations are
drawn until the target's next token is certain, and tokenised together with the text before them. A continuation does
not count if with it the target would have split the text so far otherwise, or if the small model's own tokenizer would
have split it otherwise than it was drawn: no model has seen such tokens, and what trigrams give them is smoothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.byte_tokenizer import ByteTokenizer
from benchmarks.trigrams import UNKNOWN, Trigrams

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]

_BACK = 6  # tokens of the small model before the text's end from which it is spelled again
_BEAM = 1e-3  # ways to spell up to one place whose weight is less than this share of the best one's are left
_MOST = 256  # tokens that pass the end of a text behind a path that is not the true one
_LONGEST = 16  # tokens of a continuation
_HEAD = 4  # tokens of the target with which continuations are tokenised, at least
_AHEAD = 16  # tokens of the true text that say whether these are tokenised as in the whole text
_WORD = re.compile(rb"\s*\S+\s+\S[\x80-\xbf]*")  # fixes the first token: a word, and the beginning of the next one
_SPACE = frozenset(b" \t\n\r\v\f")
_DONE = 3


@dataclass(frozen=True, slots=True)
class Place:
    """A position in a text. Before it lie the target's tokens `ids[:index]`, which spell `said`; the small model reads
    `small` for the whole characters of that."""

    ids: Sequence[int]
    index: int
    said: bytes
    small: Sequence[int]


@dataclass(frozen=True, slots=True)
class Crossing:
    """Tokens [n] that pass the text's end, and the weight of each.

    path: what is read before them since the small model's tokens that are settled. history: the last two of all of
    these. inside: how many bytes of the tokens belong to the text so far.
    """

    path: tuple[int, ...]
    history: tuple[int, int]
    tokens: Ids
    weights: Floats
    inside: int


@dataclass(frozen=True, slots=True)
class Tail:
    """The end of a text. before: the small model's tokens that are settled; spelled: its true tokens from there."""

    place: Place
    before: Sequence[int]
    spelled: tuple[int, ...]
    text: bytes


Drawn = Counter[tuple[tuple[int, ...], bytes]]  # a path with the token that passes the end; the text that follows


class Oracle:
    """Oracle of one pair of vocabularies. draws: continuations for each place and model."""

    def __init__(self, target: ByteTokenizer, small: ByteTokenizer, draws: int) -> None:
        self._target, self._small, self.draws = target, small, draws
        self._progress = np.array(
            [[_progress(state, text or b"") for text in small.texts] for state in range(_DONE + 1)], np.int8
        )

    def counts(
        self, models: Sequence[Trigrams], place: Place, rngs: Sequence[np.random.Generator]
    ) -> list[tuple[Floats, ...]]:
        """Per generator, independent of each other, and model: [target width] how many draws count for each event."""
        tail = self._tail(place)
        crossings = [self._cross(model, tail) for model in models]
        drawn = [
            [self._continue(model, ways, rng) for model, ways in zip(models, crossings, strict=True)] for rng in rngs
        ]
        texts = sorted({text for some in drawn for ways in some for _, text in ways})
        nexts = self._nexts(texts, place)
        spelled = dict(zip(texts, self._small.encode_all([_text(tail.text + text) for text in texts]), strict=True))
        return [tuple(self._count(ways, nexts, spelled) for ways in some) for some in drawn]

    def _tail(self, place: Place) -> Tail:
        start = _settled(self._small, place.small, len(place.small), _BACK)
        before, spelled = place.small[:start], tuple(place.small[start:])
        return Tail(place, before, spelled, place.said[len(self._small.decode(before)) :])

    def _cross(self, model: Trigrams, tail: Tail) -> list[Crossing]:
        """All token paths that pass the end of the text."""
        ways: list[dict[tuple[int, ...], float]] = [{} for _ in range(len(tail.text) + 1)]
        ways[0][()] = 1.0
        crossings = []
        for at, reached in enumerate(ways):
            least = _BEAM * max(reached.values(), default=0.0)
            rest = tail.text[at:]
            within, past = self._small.beginnings(rest), self._small.longer(rest)
            for path, weight in reached.items():
                true = path == tail.spelled[: len(path)]
                if not true and (weight < least or not rest):
                    continue  # what is whole is spelled as it was
                before, last = (UNKNOWN, UNKNOWN, *tail.before[-2:], *path)[-2:]
                row = np.exp(model((before, last)))
                for token in within:
                    ways[at + len(self._small.texts[token] or b"")][*path, token] = weight * row[token]
                tokens = past if true else self._made(tail, path, _likely(past, row), rest)
                if len(tokens):
                    crossings.append(Crossing(path, (before, last), tokens, weight * row[tokens], len(rest)))
        return crossings

    def _made(self, tail: Tail, path: tuple[int, ...], tokens: Ids, rest: bytes) -> Ids:
        """Those of the tokens, read behind a path that is not the true one, with which the text is spelled so and the
        target's tokens stay."""
        texts = [(self._small.texts[id_] or b"")[len(rest) :] for id_ in tokens.tolist()]
        spelled = self._small.encode_all([_text(tail.text + text) for text in texts])
        nexts = self._nexts(texts, tail.place)
        found = zip(spelled, texts, tokens.tolist(), strict=True)
        return np.array([id_ for ids, text, id_ in found if text in nexts and (*ids,) == (*path, id_)], np.int64)

    def _continue(self, model: Trigrams, crossings: Sequence[Crossing], rng: np.random.Generator) -> Drawn:
        """Drawn continuations, each cut where it cannot change the target's next token any more."""
        sizes = [len(crossing.tokens) for crossing in crossings]
        rising = np.cumsum(np.concatenate([crossing.weights for crossing in crossings]))
        places = np.searchsorted(rising, (np.arange(self.draws) + rng.random()) * (rising[-1] / self.draws))
        which = np.repeat(np.arange(len(crossings)), sizes)[places]
        token = np.concatenate([crossing.tokens for crossing in crossings])[places]
        last = np.array([crossing.history[1] for crossing in crossings])[which]
        ways = [crossings[way] for way in which.tolist()]
        paths = [(*way.path, id_) for way, id_ in zip(ways, token.tolist(), strict=True)]
        texts = [(self._small.texts[path[-1]] or b"")[way.inside :] for way, path in zip(ways, paths, strict=True)]
        state = np.array([_progress(0, text) for text in texts])
        for _ in range(_LONGEST):
            going = np.flatnonzero(state != _DONE)
            if not len(going):
                break
            token[going], last[going] = model.draw(last[going], token[going], rng), token[going]
            state[going] = self._progress[state[going], token[going]]
            for one, id_ in zip(going.tolist(), token[going].tolist(), strict=True):
                texts[one] += self._small.texts[id_] or b""
        cut = [found.group() if (found := _WORD.match(text)) else text for text in texts]
        return Counter(zip(paths, cut, strict=True))

    def _nexts(self, texts: Sequence[bytes], place: Place) -> dict[bytes, int]:
        """The target's next token in each text, if the text before stays tokenised as it is."""
        start = _settled(self._target, place.ids, place.index, _HEAD)
        known, at = list(place.ids[start : place.index]), place.index - start
        head = self._target.decode(known)
        encoded = self._target.encode_all([_text(head + text) for text in texts])
        found = zip(texts, encoded, strict=True)
        return {text: ids[at] for text, ids in found if len(ids) > at and ids[:at] == known}

    def _count(self, drawn: Drawn, nexts: Mapping[bytes, int], spelled: Mapping[bytes, Sequence[int]]) -> Floats:
        """[target width] how many of the texts have each token next."""
        counts = np.zeros(self._target.width)
        for (path, text), times in drawn.items():
            if text in nexts and tuple(spelled[text][: len(path)]) == path:
                counts[nexts[text]] += times
        return counts


def _settled(tokenizer: ByteTokenizer, ids: Sequence[int], index: int, least: int) -> int:
    """At least so many tokens before `index`, where a word begins: from there a text is tokenised as in the whole."""
    for start in range(index - least, 0, -1):
        if not (tokenizer.texts[ids[start]] or b"x")[:1].isspace():
            continue
        again = tokenizer.encode(_text(tokenizer.decode(ids[start : index + _AHEAD])))
        if again[: index + 1 - start] == list(ids[start : index + 1]):
            return start
    return 0


def _likely(tokens: Ids, row: Floats) -> Ids:
    """The likeliest of many tokens."""
    return tokens if len(tokens) <= _MOST else tokens[np.argpartition(-row[tokens], _MOST)[:_MOST]]


def _text(data: bytes) -> str:
    return data.decode(errors="replace")


def _progress(state: int, text: bytes) -> int:
    """Stage of a continuation: 0 before its first word, 1 in it, 2 in the space after it, 3 done."""
    for byte in text:
        if (state == 1) == (byte in _SPACE):
            state += 1
        if state == _DONE:
            break
    return state
