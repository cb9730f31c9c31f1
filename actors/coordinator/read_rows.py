"""Reading a model's rows: the slices of many windows from one frame, in the ids of each session's primary.

A small model of another family has no such ids: its slices stay in its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.api.generation import Role
from actors.coordinator.inflight import Asked
from actors.coordinator.session import Live
from actors.decoding.candidates import Slice
from actors.decoding.cross_vocab.translators import Alignment
from actors.decoding.vocabulary import VocabularyMap
from actors.wire.columns import rows_ids
from actors.wire.messages import WHOLE, Rows

MapOf = Callable[[Live, Role], VocabularyMap | Alignment]


def read_rows(
    message: Rows, asked: Sequence[Asked | None], width: int, map_of: MapOf
) -> Iterator[tuple[Asked | None, list[Slice]]]:
    """Per item of the message what was asked (None: nobody waits for it any more) and its rows.

    width: logits in a whole row of this model.
    """
    ids = rows_ids(message, width)
    sums, ours, reader = message.logsumexp.tolist(), dict[tuple[int, bool], NDArray[Any]](), _Reader(message)
    for one, (_, rows, k, know) in zip(asked, message.items.tolist(), strict=True):
        at = reader.next(rows, max(k, 0), width if k == WHOLE else k, know)
        if one is None:
            yield None, []
            continue
        mapping = map_of(one.window.live, one.role)
        key = (id(mapping), k == WHOLE)
        if key not in ours:
            own = np.arange(width) if k == WHOLE else ids
            ours[key] = own if isinstance(mapping, Alignment) else mapping.to_primary[own]
        theirs = ours[key]
        values = message.known[at.known].reshape(rows, know)
        folded = one.known.fold(values) if one.known is not None else values
        slices = []
        for row in range(rows):
            if k == WHOLE:
                mine, logits = theirs, message.logits[at.logits + row * width : at.logits + (row + 1) * width]
            else:
                mine = theirs[at.ids + row * k : at.ids + (row + 1) * k]
                logits = message.logits[at.logits + row * k : at.logits + (row + 1) * k]
            events = folded[row] if one.before is None else one.before.folded
            slices.append(Slice(mine, logits, events, sums[at.rows + row]))
        yield one, slices


class _At:
    """Where an item's parts begin in the flat columns."""

    __slots__ = ("ids", "known", "logits", "rows")

    def __init__(self, rows: int, ids: int, logits: int, known: slice) -> None:
        self.rows, self.ids, self.logits, self.known = rows, ids, logits, known


class _Reader:
    """Walks through the items of a message."""

    def __init__(self, message: Rows) -> None:
        self._rows = self._ids = self._logits = self._known = 0

    def next(self, rows: int, ids: int, logits: int, known: int) -> _At:
        """The next item: `rows` rows of so many ids, logits and known values each."""
        at = _At(self._rows, self._ids, self._logits, slice(self._known, self._known + rows * known))
        self._rows += rows
        self._ids += rows * ids
        self._logits += rows * logits
        self._known += rows * known
        return at
