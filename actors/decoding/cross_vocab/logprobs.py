"""What a small model of another vocabulary says of the target's tokens: log-probabilities of events, for many rows.

An event's probability is the sum over the small tokens that mean it, in the row of the text so far; and, where small
tokens straddle a boundary that the target has passed, of theirs in the rows of earlier boundaries, weighted by the path
that the true tokens took from there. Both together are normalised over all that is still possible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.api.generation import Role
from actors.decoding.candidates import CandidateBlock, Floats, Ids, RowProposal, RowSlice
from actors.decoding.cross_vocab.retokenizer import CrossedBoundaries
from actors.decoding.cross_vocab.tables import Tables

FLOOR = -60.0  # of a log-probability: below it guidance says nothing


class CrossingRows:
    """The rows of a straddle, and what they say.

    at [m]: which row, counted from the earliest. ids [m]: what is asked of it, ascending within a row. nexts [m]: the
    target's token that a straddler goes on with, -1 for the row's own next token; whole [m]: whether it ends there.
    values [m]: logits, NaN until they are known. sums: the rows' logsumexp.
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
    def share_values(asked: Sequence[CrossingRows]) -> Floats:
        """Their values are asked, from the beginning: one array that holds them all, one after another."""
        values = np.full(sum(len(each.ids) for each in asked), np.nan)
        end = 0
        for each in asked:
            end += len(each.ids)
            each.values = values[end - len(each.ids) : end]
        return values

    @property
    def complete(self) -> bool:
        """Whether all that was asked has come."""
        return not np.isnan(self.values).any()

    def log_weights(self) -> tuple[float, Ids, Floats] | None:
        """Log-weights: of the newest row's own events, and of each straddler with the token that it goes on with.

        None if nothing is known of what comes next. They are normalised: exp of them all adds up to 1.
        """
        log_p = self.values - self.sums[self.at]
        own = self.nexts < 0
        weights = np.concatenate([[0.0], np.cumsum(log_p[own])])
        across = weights[self.at[~own]] + log_p[~own]
        mine = -np.inf if self.boundaries.partial else float(weights[-1])
        top = max(mine, float(across.max(initial=-np.inf)))
        if top == -np.inf:
            return None
        total = np.exp(mine - top) + np.cumsum(np.exp(across - top))[-1] if len(across) else np.exp(mine - top)
        norm = top + float(np.log(total))
        return mine - norm, self.nexts[~own], across - norm

    def proposed_tokens(self, most: int) -> Ids:
        """The tokens that the likeliest straddlers go on with; of equal ones those of the lowest ids."""
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
    """What a small model said of one row so far, in its own ids. slice: None if it has not answered."""

    slice: RowSlice | None
    crossing: CrossingRows | None


def proposed_tokens(tables: Tables, inputs: Sequence[RoleRowInput], k: int) -> NDArray[np.int64]:
    """[B, n] the target's tokens that the guider puts forward in each row: images of its slice and of straddlers; -1
    behind and in between."""
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
    """One small model's part of a block: log-probabilities of the candidates as events."""

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
        self._masses: Floats | None = None
        ends = np.cumsum(counts.reshape(ids.shape).sum(1))
        self._parts = [slice(end - size, end) for end, size in zip(ends, np.diff(ends, prepend=0), strict=True)]
        self._add_slices([(row, each.slice) for row, each in enumerate(inputs) if each.slice is not None])

    def add_slice(self, row: int, part: RowSlice) -> None:
        """Take in a slice of one row."""
        self._sums[row], self._masses = part.logsumexp, None
        if not len(part.ids):
            return
        mine = self.tokens[self._parts[row]]
        found = np.minimum(np.searchsorted(part.ids, mine), len(part.ids) - 1)
        here = part.ids[found] == mine
        self.values[self._parts[row]][here] = part.logits[found[here]]

    def _add_slices(self, parts: Sequence[tuple[int, RowSlice]]) -> None:
        for row, part in parts:
            self._sums[row] = part.logsumexp
        parts = [(row, part) for row, part in parts if len(part.ids)]
        if not parts:
            return
        keys = np.concatenate([part.ids.astype(np.int64) + (row << 32) for row, part in parts])
        logits = np.concatenate([part.logits for _, part in parts])
        mine = self.tokens + (self.at << 32)
        found = np.minimum(np.searchsorted(keys, mine), len(keys) - 1)
        here = keys[found] == mine
        self.values[here] = logits[found[here]]

    def missing_logits(self) -> tuple[Ids, Ids, Ids]:
        """Rows [n], places [n] and ids [n] of what must be looked up."""
        places = np.flatnonzero(np.isnan(self.values))
        return self.at[places], places, self.tokens[places]

    def fill(self, places: Ids, values: NDArray[Any]) -> None:
        """Take in what was looked up."""
        self.values[places], self._masses = values, None

    def masses(self) -> Floats:
        """[B, W]; NaN where the model has no such event, or nothing is known of a row."""
        if self._masses is None:
            self._masses = self._fold()
        return self._masses

    def _fold(self) -> Floats:
        out = np.full(self._ids.size, np.nan)
        there = self._counts > 0
        if there.any():
            begin = (np.cumsum(self._counts) - self._counts)[there]
            with np.errstate(invalid="ignore"):  # rows of which something is still on its way
                out[there] = np.logaddexp.reduceat(self.values, begin)
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
        _add(masses, _summed(self._ids[row], nexts, across))
        if (lone := np.flatnonzero(self._indirect[row])).size:
            inputs, which = np.unique(self._represented_by[row, lone], return_inverse=True)
            whole = crossing.whole[crossing.nexts >= 0]
            shared = np.full(len(masses), -np.inf)
            shared[lone] = _summed(inputs, nexts[whole], across[whole])[which]
            _add(masses, shared)
        return masses


def _summed(ids: Ids, nexts: Ids, across: Floats) -> Floats:
    """[W] by ascending id the log-probabilities [n] of straddlers that go on with it, together; -inf for none."""
    summed = np.full(len(ids), -np.inf)
    places = np.minimum(np.searchsorted(ids, nexts), len(ids) - 1)
    here = ids[places] == nexts
    np.logaddexp.at(summed, places[here], across[here])
    return summed


def _add(masses: Floats, more: Floats) -> None:
    """Add probabilities [W], -inf for none, to masses that may be NaN."""
    here = np.flatnonzero(more > -np.inf)
    masses[here] = np.logaddexp(np.where(np.isnan(masses[here]), -np.inf, masses[here]), more[here])


class CrossVocabBlock(CandidateBlock):
    """B rows side by side whose small models have other vocabularies: their values are log-probabilities of events."""

    def __init__(
        self, rows: Sequence[RowProposal], tables: Mapping[Role, Tables], inputs: Mapping[Role, Sequence[RoleRowInput]]
    ) -> None:
        """rows: of one shape; the guider's proposals are in the target's ids. inputs: by small role, row by row."""
        super().__init__(rows)
        self._events = {
            role: TokenEventLogprobs(tables[role], self.ids, self.inside, each) for role, each in inputs.items()
        }
        for role in inputs:
            self.logsumexp[role] = np.zeros(len(rows))

    def values(self, role: Role) -> Floats:
        """[B, W]."""
        return self._events[role].masses() if role in self._events else super().values(role)

    def add_slice(self, role: Role, row: int, part: RowSlice) -> None:
        """Take in a slice that came after the block was made."""
        if role in self._events:
            self._events[role].add_slice(row, part)
        else:
            super().add_slice(role, row, part)

    def missing_logits(self, role: Role, theirs: NDArray[np.int64]) -> tuple[Ids, Ids, Ids]:
        """Rows [n], places [n] and the role's ids [n] of what it was not asked for yet."""
        if role in self._events:
            return self._events[role].missing_logits()
        return super().missing_logits(role, theirs)

    def fill(self, role: Role, rows: Ids | int, places: Ids, values: NDArray[Any]) -> None:
        """Take in what was looked up."""
        if role in self._events:
            self._events[role].fill(places, values)
        else:
            super().fill(role, rows, places, values)
