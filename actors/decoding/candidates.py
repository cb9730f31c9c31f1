"""Which ids a row is decided over, and what each role knows of them.

A row's candidates are what its roles put forward: the ids of the target's and of the guider's slice, and the events
that every row must know. They are a function of that row's slices alone, in id order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[Any]
Floats = NDArray[np.float64]
NONE: Ids = np.zeros(0, np.int64)
PADDING = 1 << 32  # above every id, so that it sorts last


@dataclass(slots=True)
class Lookup:
    """Ids asked of a role beside its slice, and the answer.

    places: where they stand among the candidates once these are known; -1 for an id that is none.
    """

    ids: Ids
    places: Ids | None = None
    values: NDArray[Any] | None = None


@dataclass(slots=True)
class Part:
    """What is known of one row in one role, in the primary's ids.

    events [g]: ids that every row knows, with their folded logits. ids, logits [k]: the slice; -1 where the primary
    has no such id. places [g + k]: where events and slice stand among the row's candidates (-1 for an id of -1).
    """

    events: Ids = field(default_factory=lambda: NONE)
    folded: Floats = field(default_factory=lambda: np.zeros(0))
    ids: Ids = field(default_factory=lambda: NONE)
    logits: NDArray[Any] = field(default_factory=lambda: np.zeros(0))
    places: Ids | None = None
    lookups: list[Lookup] = field(default_factory=list)
    logsumexp: float = 0.0
    ceiling: float = np.inf  # no id outside the slice has a higher logit
    arrived: bool = False
    waiting: int = 0  # lookups on their way

    @property
    def complete(self) -> bool:
        """Whether all that was asked of this role has come."""
        return self.arrived and not self.waiting

    def arrive(self, folded: Floats, ids: Ids, logits: NDArray[Any], logsumexp: float) -> None:
        """Take in the row's own reply: the folded events and the slice."""
        self.folded, self.logsumexp, self.arrived = folded, logsumexp, True
        self.widen(ids, logits)

    def widen(self, ids: Ids, logits: NDArray[Any]) -> None:
        """Take in a slice in the place of a narrower one."""
        self.ids, self.logits = ids, logits
        self.ceiling = float(logits.min()) if len(logits) else np.inf

    def missing(self, count: int) -> Ids:
        """Places of those of the row's `count` candidates that this role was not asked for yet."""
        assert self.places is not None
        lacking = np.ones(count + 1, np.bool_)  # the last one takes what is no candidate
        lacking[self.places] = False
        for lookup in self.lookups:
            lacking[lookup.places] = False
        return np.flatnonzero(lacking[:count])

    def values(self, count: int) -> Floats:
        """[count]: logits at the row's candidates, NaN where the role has no such id. Folded events come first."""
        assert self.places is not None
        out = np.full(count + 1, np.nan)
        for lookup in self.lookups:
            out[lookup.places] = lookup.values
        events = len(self.events)
        out[self.places[events:]] = self.logits
        out[self.places[:events]] = self.folded
        return out[:count]


def join(rows: Sequence[Sequence[Part]]) -> list[Ids]:
    """The candidates of each row from its roles' parts, ascending; sets the places of all that is known so far."""
    shapes: dict[tuple[int, ...], list[int]] = {}
    for index, parts in enumerate(rows):
        shapes.setdefault(tuple(len(ids) for part in parts for ids in (part.events, part.ids)), []).append(index)
    found: dict[int, Ids] = {}
    for lengths, indices in shapes.items():
        flat = [ids for index in indices for part in rows[index] for ids in (part.events, part.ids)]
        together = np.concatenate(flat).reshape(len(indices), sum(lengths))
        ids, places = _rank(together)
        for at, index in enumerate(indices):
            found[index] = ids[at]
            _place(rows[index], ids[at], places[at])
    return [found[index] for index in range(len(rows))]


def _rank(together: Ids) -> tuple[list[Ids], Ids]:
    """[B, N] ids -> per row its distinct ids ascending, and [B, N] where among them each one stands (-1: nowhere)."""
    keyed = np.where(together < 0, PADDING, together)
    order = np.argsort(keyed, axis=1, kind="stable")
    ranked = np.take_along_axis(keyed, order, 1)
    first = np.ones(ranked.shape, np.bool_)
    np.not_equal(ranked[:, 1:], ranked[:, :-1], out=first[:, 1:])
    real = ranked < PADDING
    standing = np.where(real, np.cumsum(first, 1) - 1, -1)
    places = np.empty_like(order)
    np.put_along_axis(places, order, standing, 1)
    return [row[keep] for row, keep in zip(ranked, first & real, strict=True)], places


def _place(parts: Sequence[Part], ids: Ids, places: Ids) -> None:
    begin = 0
    for part in parts:
        end = begin + len(part.events) + len(part.ids)
        part.places = places[begin:end]
        begin = end
        for lookup in part.lookups:
            lookup.places = _find(ids, lookup.ids)


def _find(ids: Ids, wanted: Ids) -> Ids:
    """Where the wanted ids stand among a row's candidates; -1 for what is none, as after another slice came."""
    if not len(ids):
        return np.full(len(wanted), -1)
    places = ids.searchsorted(wanted)
    found = ids.take(places, mode="clip") == wanted
    return places if found.all() else np.where(found, places, -1)


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """Candidates of B rows side by side: ids [B, W] ascending, then PADDING; `inside` [B, W]: where they are real."""

    ids: NDArray[np.int64]
    inside: NDArray[np.bool_]

    def values(self, parts: Sequence[Part], counts: Sequence[int]) -> Floats:
        """[B, W]: one role's logits at the candidates; NaN where it has no such id, and in the padding."""
        out = np.full(self.ids.shape, np.nan)
        for row, part, count in zip(out, parts, counts, strict=True):
            row[:count] = part.values(count)
        return out


def side_by_side(rows: Sequence[Ids]) -> Dense:
    """Rows of candidates as one array."""
    width = max(map(len, rows), default=1) or 1
    ids = np.full((len(rows), width), PADDING, np.int64)
    for out, row in zip(ids, rows, strict=True):
        out[: len(row)] = row
    return Dense(ids, ids < PADDING)
