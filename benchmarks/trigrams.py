"""A language model that is exact, quick to train and quick to draw from: trigrams of token ids.

    p(w | u v) = (count(u v w) + kinds(u v) p(w | v)) / (count(u v) + kinds(u v))

with kinds(h) the number of different tokens seen after h (the weights of Witten and Bell), p(w | v) in the same way
from p(w), and p(w) the share of w in the text mixed with the uniform distribution over all tokens that are text. What
follows h is kept as the list of all tokens that did, so that a draw is a choice from that list.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]

UNKNOWN = -1  # a token that no text had, and what stands before a text's first
NEVER = 1e-30
UNIFORM = 1e-3  # what the uniform distribution takes from single tokens


class Followers:
    """Tokens that followed each history of one length, in a text.

    keys [n]: the histories, ascending. starts [n + 1]: where the followers of each begin in `tokens`, which are
    ascending within a history. kinds [n]: how many of them are different.
    """

    def __init__(self, histories: Ids, tokens: Ids) -> None:
        order = np.lexsort((tokens, histories))
        histories, self.tokens = histories[order], tokens[order]
        self.keys, starts = np.unique(histories, return_index=True)
        self.starts = np.append(starts, len(histories))
        new = np.ones(len(histories), np.int64)
        new[1:] = (np.diff(histories) != 0) | (np.diff(self.tokens) != 0)
        self.kinds = np.add.reduceat(new, starts) if len(starts) else new

    def find(self, histories: Ids) -> Ids:
        """[n] places in `keys`, -1 for a history that never was."""
        if not len(self.keys):
            return np.full(len(histories), -1, np.int64)
        places = np.minimum(np.searchsorted(self.keys, histories), len(self.keys) - 1)
        found: Ids = np.where(self.keys[places] == histories, places, -1)
        return found

    def counts(self, places: Ids) -> Ids:
        """[n] how many tokens followed each history."""
        number: Ids = self.starts[places + 1] - self.starts[places]
        return number

    def add(self, row: Floats, history: int) -> None:
        """Turn the lower order's probabilities [width] into this one's, in place."""
        place = self.find(np.array([history]))
        if place[0] < 0:
            return
        count, kinds = int(self.counts(place)[0]), int(self.kinds[place[0]])
        row *= kinds / (count + kinds)
        after = self.tokens[self.starts[place[0]] : self.starts[place[0] + 1]]
        np.add.at(row, after, 1.0 / (count + kinds))


class Trigrams:
    """The model of one text. width: ids that a row has; texts: those that may come, [m] ascending."""

    def __init__(self, text: Sequence[int], width: int, texts: Sequence[int] | Ids) -> None:
        self.width = width
        self._text = np.asarray(text, np.int64)
        self._texts = np.asarray(texts, np.int64)
        assert len(self._text) >= 3
        one, two, three = self._text[:-2], self._text[1:-1], self._text[2:]
        self._pairs = Followers(self._key(one, two), three)
        self._singles = Followers(self._text[:-1], self._text[1:])
        seen = np.bincount(self._text, minlength=width).astype(np.float64)
        self._row: Floats = seen * ((1.0 - UNIFORM) / len(self._text))
        self._row[self._texts] += UNIFORM / len(self._texts)

    def __call__(self, context: Sequence[int]) -> Floats:
        """[width] log-probabilities of the next token; the log of NEVER for tokens that are no text."""
        before, last = (UNKNOWN, UNKNOWN, *context)[-2:]
        row: Floats = self._row.copy()
        if last != UNKNOWN:
            self._singles.add(row, last)
            if before != UNKNOWN:
                self._pairs.add(row, int(self._key(np.array([before]), np.array([last]))[0]))
        logs: Floats = np.log(np.maximum(row, NEVER))
        return logs

    def draw(self, before: Ids, last: Ids, rng: np.random.Generator) -> Ids:
        """One next token for each of n histories (before, last), [n] each."""
        drawn = np.full(len(last), UNKNOWN)
        known = (before != UNKNOWN) & (last != UNKNOWN)
        pairs = np.where(known, self._key(before, last), UNKNOWN)
        for followers, histories in ((self._pairs, pairs), (self._singles, last)):
            self._draw_order(followers, histories, drawn, rng)
        rest = np.flatnonzero(drawn == UNKNOWN)
        from_text = rng.random(len(rest)) >= UNIFORM
        seen = self._text[rng.integers(len(self._text), size=len(rest))]
        drawn[rest] = np.where(from_text, seen, self._texts[rng.integers(len(self._texts), size=len(rest))])
        return drawn

    def _draw_order(self, followers: Followers, histories: Ids, drawn: Ids, rng: np.random.Generator) -> None:
        """Fill in what this order of history decides; the rest is left to the lower one."""
        open_ = np.flatnonzero(drawn == UNKNOWN)
        places = followers.find(histories[open_])
        open_, places = open_[places >= 0], places[places >= 0]
        counts = followers.counts(places)
        here = rng.random(len(open_)) * (counts + followers.kinds[places]) < counts
        open_, places, counts = open_[here], places[here], counts[here]
        within = (rng.random(len(open_)) * counts).astype(np.int64)
        drawn[open_] = followers.tokens[followers.starts[places] + within]

    def _key(self, before: Ids, last: Ids) -> Ids:
        return before * self.width + last
