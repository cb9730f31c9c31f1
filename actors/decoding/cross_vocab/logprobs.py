"""Log-probabilities of the target's tokens under a small model with another vocabulary, for many rows at once.

The probability of an event (the text continues with a token t of the target) has two parts:
1. the sum over the small tokens that count towards t, in the small model's row of the text so far;
2. the sum over boundary-crossing tokens that continue with t, in rows of earlier boundaries, each times the probability
   of the small model's true tokens from that boundary on.
Both are divided by the probability of all continuations that the text so far allows. Example: the text is "foot|b",
the true small tokens are "foot" and "b", and the small row after "foot" gives 0.1 to "b" and 0.3 to "ball". Then the
newest row, after "b", weighs 0.1 / (0.1 + 0.3) = 0.25, and the target's token "all" gets 0.75 from "ball".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.decoding.candidates import Floats, Ids, RowSlice
from actors.decoding.cross_vocab.retokenizer import CrossedBoundaries
from actors.decoding.cross_vocab.tables import Tables

FLOOR = -60.0  # of log-probabilities (nats): smaller ones are noise


class CrossingRows:
    """The earlier rows of one row's crossed boundaries, and the m logits required from them.

    at [m]: index of the row, 0 for the earliest. ids [m]: the small model's id, ascending within a row. nexts [m]: the
    target's token with which a crossing token continues, -1 for the true next token of the row. whole [m]: True if the
    crossing token ends there. values [m]: logits, NaN until they are known. sums: by row its logsumexp.
    """

    __slots__ = ("at", "boundaries", "ids", "nexts", "rows", "sums", "values", "whole")

    def __init__(self, boundaries: CrossedBoundaries) -> None:
        self.boundaries = boundaries
        rows, ids, nexts, whole = [], [], [], []
        for number, crossing_tokens in enumerate(boundaries.crossing_tokens):
            if number < len(boundaries.path):
                rows.append(np.array([number]))
                ids.append(np.array([boundaries.path[number]]))
                nexts.append(_OWN)
                whole.append(_NOT)
            if crossing_tokens is not None:
                rows.append(np.full(len(crossing_tokens.tokens), number))
                ids.append(crossing_tokens.tokens)
                nexts.append(crossing_tokens.nexts)
                whole.append(crossing_tokens.whole)
        at, flat = np.concatenate(rows or [_NOTHING]), np.concatenate(ids or [_NOTHING])
        order = np.lexsort((flat, at))
        self.at, self.ids, self.nexts = at[order], flat[order], np.concatenate(nexts or [_NOTHING])[order]
        self.whole = np.concatenate(whole or [_NOT[:0]])[order]
        self.rows = int(self.at[-1]) + 1 if len(at) else 0
        self.values = np.full(len(flat), np.nan)
        self.sums = np.full(self.rows, np.nan)

    @staticmethod
    def share_values(several: Sequence[CrossingRows]) -> Floats:
        """Let all of them keep their values, unknown at first, in one array, which is returned."""
        values = np.full(sum(len(each.ids) for each in several), np.nan)
        end = 0
        for each in several:
            end += len(each.ids)
            each.values = values[end - len(each.ids) : end]
        return values

    @property
    def complete(self) -> bool:
        """True if all logits are known."""
        return not np.isnan(self.values).any()

    def log_weights(self) -> tuple[float, Ids, Floats] | None:
        """The log-weight of the newest row, and the next token and log-weight of each crossing token.

        The weights add up to 1. None if no continuation has any probability.
        """
        log_p = self.values - self.sums[self.at]
        own = self.nexts < 0
        weights = np.concatenate([[0.0], np.cumsum(log_p[own])])
        across = weights[self.at[~own]] + log_p[~own]
        newest = -np.inf if self.boundaries.partial else float(weights[-1])
        top = max(newest, float(across.max(initial=-np.inf)))
        if top == -np.inf:
            return None
        total = np.exp(newest - top) + np.cumsum(np.exp(across - top))[-1] if len(across) else np.exp(newest - top)
        norm = top + float(np.log(total))
        return newest - norm, self.nexts[~own], across - norm

    def proposed_tokens(self, most: int) -> Ids:
        """The next tokens of the `most` likeliest crossing tokens; of equally likely ones the lowest ids count."""
        weighed = self.log_weights()
        if weighed is None:
            return _NOTHING
        _, nexts, across = weighed
        if len(nexts) > most:
            nexts = nexts[np.lexsort((nexts, -across))[:most]]
        return np.unique(nexts)


_NOTHING = np.zeros(0, np.int64)
_OWN, _NOT = np.array([-1]), np.array([False])


@dataclass(frozen=True, slots=True, eq=False)
class RoleRowInput:
    """A small model's answers for one row so far, in its own ids. slice: None if it has not answered."""

    slice: RowSlice | None
    crossing: CrossingRows | None


def proposed_tokens(tables: Tables, inputs: Sequence[RoleRowInput], k: int) -> NDArray[np.int64]:
    """The target's tokens [B, n] that the guider proposes for each row, -1 in the gaps.

    They are the images of the ids in its slice, and the next tokens of at most k crossing tokens.
    """
    slices = [each.slice.ids for each in inputs if each.slice is not None]
    images = np.sort(tables.image[np.stack(slices)], axis=1)
    images[:, 1:][images[:, 1:] == images[:, :-1]] = -1
    across = [each.crossing.proposed_tokens(k) if each.crossing is not None else _NOTHING for each in inputs]
    if not any(len(nexts) for nexts in across):
        return images
    out = np.full((len(images), images.shape[1] + k), -1, np.int64)
    out[:, : images.shape[1]] = images
    for row, nexts in enumerate(across):
        fresh = nexts[~np.isin(nexts, images[row])]
        out[row, images.shape[1] : images.shape[1] + len(fresh)] = fresh
    return out


class TokenEventLogprobs:
    """One small model's log-probabilities of a block's candidates as events.

    ids, inside: [B, W], those of the block. inputs: by row the small model's answers so far. The n small tokens of all
    events are `tokens` [n] in the rows `at` [n]; `values` [n] are their logits, NaN until they are known.
    """

    def __init__(self, tables: Tables, ids: Ids, inside: NDArray[np.bool_], inputs: Sequence[RoleRowInput]) -> None:
        self._ids = ids
        self._represented_by = tables.represented_by[np.where(inside, ids, 0)]
        self._indirect = inside & (self._represented_by != ids)
        counts = np.zeros(ids.size, np.int64)
        self.tokens, counts[inside.reshape(-1)] = tables.events.take(ids[inside])
        self.at = np.repeat(np.arange(len(ids)), counts.reshape(ids.shape).sum(1))
        self.values = np.full(len(self.tokens), np.nan)
        self._counts, self._sums = counts, np.zeros(len(ids))
        self._crossing = [each.crossing for each in inputs]
        ends = np.cumsum(counts.reshape(ids.shape).sum(1))
        self._parts = [slice(end - size, end) for end, size in zip(ends, np.diff(ends, prepend=0), strict=True)]
        self._add_slices([(row, each.slice) for row, each in enumerate(inputs) if each.slice is not None])

    def add_slice(self, row: int, part: RowSlice) -> None:
        """Store a slice of one row."""
        self._sums[row] = part.logsumexp
        if not len(part.ids):
            return
        wanted = self.tokens[self._parts[row]]
        found = np.minimum(np.searchsorted(part.ids, wanted), len(part.ids) - 1)
        present = part.ids[found] == wanted
        self.values[self._parts[row]][present] = part.logits[found[present]]

    def _add_slices(self, parts: Sequence[tuple[int, RowSlice]]) -> None:
        for row, part in parts:
            self._sums[row] = part.logsumexp
        parts = [(row, part) for row, part in parts if len(part.ids)]
        if not parts:
            return
        keys = np.concatenate([part.ids.astype(np.int64) + (row << 32) for row, part in parts])
        logits = np.concatenate([part.logits for _, part in parts])
        wanted = self.tokens + (self.at << 32)
        found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        present = keys[found] == wanted
        self.values[present] = logits[found[present]]

    def missing_logits(self) -> tuple[Ids, Ids, Ids]:
        """Rows [n], places [n] and the small model's ids [n] of the logits that must be looked up."""
        places = np.flatnonzero(np.isnan(self.values))
        return self.at[places], places, self.tokens[places]

    def fill(self, places: Ids, values: NDArray[Any]) -> None:
        """Store the logits of a lookup."""
        self.values[places] = values

    def masses(self) -> Floats:
        """Log-probabilities [B, W] as of now; NaN for an event without small tokens, and without continuations.

        Nothing is kept: logits of crossing tokens may arrive at any time, and rows become complete one by one.
        """
        out = np.full(self._ids.size, np.nan)
        nonempty = self._counts > 0
        if nonempty.any():
            begin = (np.cumsum(self._counts) - self._counts)[nonempty]
            with np.errstate(invalid="ignore"):  # rows with lookups in flight hold NaN
                out[nonempty] = np.logaddexp.reduceat(self.values, begin)
        folded = out.reshape(self._ids.shape) - self._sums[:, None]
        for row, crossing in enumerate(self._crossing):
            if crossing is not None:
                with np.errstate(invalid="ignore"):
                    folded[row] = self._across(folded[row], row, crossing)
        floored: Floats = np.maximum(folded, FLOOR)  # NaN stays
        return floored

    def _across(self, own: Floats, row: int, crossing: CrossingRows) -> Floats:
        weighed = crossing.log_weights()
        if weighed is None:
            return np.full(own.shape, np.nan)
        weight, nexts, across = weighed
        masses = own + weight
        _add_probabilities(masses, _summed(self._ids[row], nexts, across))
        if (indirect := np.flatnonzero(self._indirect[row])).size:
            events, which = np.unique(self._represented_by[row, indirect], return_inverse=True)
            whole = crossing.whole[crossing.nexts >= 0]
            shared = np.full(len(masses), -np.inf)
            shared[indirect] = _summed(events, nexts[whole], across[whole])[which]
            _add_probabilities(masses, shared)
        return masses


def _summed(ids: Ids, nexts: Ids, across: Floats) -> Floats:
    """By id [W], ascending, the log of the summed probabilities of crossing tokens with this next token; -inf for none.

    nexts, across: [n], next tokens and log-probabilities of the crossing tokens.
    """
    summed = np.full(len(ids), -np.inf)
    places = np.minimum(np.searchsorted(ids, nexts), len(ids) - 1)
    present = ids[places] == nexts
    np.logaddexp.at(summed, places[present], across[present])
    return summed


def _add_probabilities(masses: Floats, more: Floats) -> None:
    """Add probabilities in place. masses, more: [W] log-probabilities, -inf for none; masses may be NaN for none."""
    present = np.flatnonzero(more > -np.inf)
    masses[present] = np.logaddexp(np.where(np.isnan(masses[present]), -np.inf, masses[present]), more[present])
