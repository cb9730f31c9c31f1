"""Which ids a row is decided over, and what is still to be asked.

Rows of many sessions are handled together as flat arrays. A row's ids become keys `row * SPAN + id`, so that one sort
or search serves all rows. A row's candidates are a function of that row's slices alone, in id order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[Any]
Floats = NDArray[np.float64]
SPAN = 1 << 32  # above every id; also the padding id of dense rows, which sorts last


@dataclass(slots=True)
class Part:
    """What is known of one row in one role, in the primary's ids (-1 where the primary has no such id).

    proposed: ids of the slice and of the folded events. asked: everything proposed or asked for since. ids and
    values: known logits, piece by piece; where pieces overlap the earlier one counts.
    """

    proposed: list[Ids] = field(default_factory=list)
    asked: list[Ids] = field(default_factory=list)
    ids: list[Ids] = field(default_factory=list)
    values: list[NDArray[Any]] = field(default_factory=list)
    logsumexp: float = 0.0
    ceiling: float = np.inf  # no id outside the slice has a higher logit
    arrived: bool = False
    whole: bool = False
    waiting: int = 0  # lookups and widenings on their way

    @property
    def complete(self) -> bool:
        """Whether all that was asked of this role has come."""
        return self.arrived and not self.waiting

    def add_rows(self, events: Ids, folded: Floats, ids: Ids, logits: NDArray[Any], logsumexp: float) -> None:
        """Take in the row's own reply: folded events [g] and the slice [k], ahead of what lookups brought before."""
        self.proposed = [events, ids]
        self.asked = [events, ids, *self.asked]
        self.ids, self.values = [events, ids, *self.ids], [folded, logits, *self.values]
        self.logsumexp, self.arrived = logsumexp, True
        self.ceiling = float(logits.min(initial=np.inf))

    def widen(self, ids: Ids, logits: NDArray[Any]) -> None:
        """Take in a wider slice of the row; the folded events stand."""
        self.proposed = [self.proposed[0], ids]
        self.asked.append(ids)
        self.ceiling = float(logits.min(initial=np.inf))
        self.add_values(ids, logits)

    def add_values(self, ids: Ids, values: NDArray[Any]) -> None:
        """Take in the answer to a lookup."""
        self.ids.append(ids)
        self.values.append(values)


def keys(rows: Sequence[Sequence[Ids]]) -> NDArray[np.int64]:
    """Keys of every piece of every row, in order; ids of -1 give negative keys."""
    pieces = [piece for row in rows for piece in row]
    if not pieces:
        return np.zeros(0, np.int64)
    lengths = [sum(len(piece) for piece in row) for row in rows]
    flat = np.concatenate(pieces).astype(np.int64)
    return np.where(flat < 0, -1, flat + np.repeat(np.arange(len(rows)) * SPAN, lengths))


def unique(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """The distinct keys that stand for an id, ascending: by row, then by id."""
    ordered = np.sort(values)  # np.unique hashes integers, which takes several times as long
    ordered = ordered[np.searchsorted(ordered, 0) :]
    first = np.ones(len(ordered), np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    return ordered[first]


def missing(wanted: NDArray[np.int64], asked: Sequence[Sequence[Ids]]) -> list[NDArray[np.int64]]:
    """Per row, the wanted ids that this role has neither proposed nor been asked for."""
    gap = wanted[~_places(np.sort(keys(asked)), wanted)[1]]
    bounds = np.searchsorted(gap, np.arange(len(asked) + 1) * SPAN)
    return [gap[low:high] % SPAN for low, high in itertools.pairwise(bounds)]


def _places(ordered: NDArray[np.int64], sought: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Where each key would stand in `ordered`, and whether it does."""
    place = np.searchsorted(ordered, sought)
    found = place < len(ordered)
    found[found] = ordered[place[found]] == sought[found]
    return place, found


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """Candidates of B rows side by side: ids [B, W] ascending, padded with SPAN, and `inside` where they are real."""

    ids: NDArray[np.int64]
    inside: NDArray[np.bool_]
    _keys: NDArray[np.int64]
    _at: NDArray[np.int64]  # flat places of the keys in [B, W]

    def values(self, parts: Sequence[Part]) -> Floats:
        """[B, W]: one role's logits at the candidates; NaN where it has no such id."""
        known = keys([part.ids for part in parts])[::-1]  # backwards: what is written last is what came first
        out = np.full(self.ids.size, np.nan)
        if len(known):
            flat = np.concatenate([v for part in parts for v in part.values])[::-1]
            place, found = _places(self._keys, known)
            out[self._at[place[found]]] = flat[found]
        return out.reshape(self.ids.shape)


def candidates(parts: Sequence[Sequence[Part]]) -> Dense:
    """The candidates of B rows; `parts[b]` are those of row b's roles that propose ids."""
    found = unique(keys([[piece for part in row for piece in part.proposed] for row in parts]))
    row, ids = found // SPAN, found % SPAN
    counts = np.bincount(row, minlength=len(parts))
    width = int(counts.max(initial=1))
    at = row * width + np.arange(len(found)) - np.repeat(np.cumsum(counts) - counts, counts)
    dense = np.full(len(parts) * width, SPAN, np.int64)
    dense[at] = ids
    inside = np.zeros(dense.size, np.bool_)
    inside[at] = True
    shape = (len(parts), width)
    return Dense(dense.reshape(shape), inside.reshape(shape), found, at)
