"""The rows of one message of a model replica, located and checked."""

from __future__ import annotations

import numpy as np

from actors.decoding.candidates import Ids, RowSlice, read_only
from actors.decoding.kernels import SentRows, locate_rows
from actors.wire.columns import rows_ids
from actors.wire.ids import page_counts
from actors.wire.messages import WHOLE, ProtocolError, Rows


class ReceivedRows:
    """The rows of a message by number. width: logits in a whole row of this model."""

    def __init__(self, message: Rows, width: int) -> None:
        items = message.items
        self.rows, self._ks, self._required = (np.ascontiguousarray(items[n]) for n in ("rows", "k", "required_ids"))
        self.first_row = np.cumsum(self.rows) - self.rows
        if len(items) and min(self.rows.min(), self._required.min()) < 0:
            raise ProtocolError("Rows.items has a negative count")
        starts, pages = np.empty((int(self.rows.sum()), 4), np.int64), page_counts(width)
        lengths = locate_rows(self.rows, self._ks, self._required, width, starts)
        columns = [read_only(each) for each in (message.ids, message.pages, message.logits)]
        columns += [read_only(each) for each in (message.logsumexp, message.tempered, message.required)]
        expected = lengths[0], len(starts) * pages, lengths[1], len(starts), len(starts), lengths[2]
        if tuple(map(len, columns)) != expected:
            raise ProtocolError("the columns of Rows do not fit its items")
        self.sent = SentRows(starts, columns[0], columns[1], pages, *columns[2:])
        self._message, self._width = message, width
        self._ids: Ids | None = None  # joined when they are needed

    def check(self, items: Ids, k: int, required: int) -> None:
        """Raise ProtocolError unless these items have slices of k, and so many required logits, as was requested."""
        if (self._ks[items] != min(k, self._width)).any() or (self._required[items] != required).any():
            raise ProtocolError("a model sent slices of another width, or other required logits, than was requested")

    def item_of(self, row: int) -> int:
        """The item to which a row belongs."""
        return int(np.searchsorted(self.first_row, row, "right")) - 1

    def slice(self, source: int) -> RowSlice:
        """One row in the model's own ids."""
        k, id_at, logit_at, _ = self.sent.starts[source].tolist()
        if self._ids is None:
            self._ids = rows_ids(self._message, self._width)
        ids = np.arange(self._width) if k == WHOLE else self._ids[id_at : id_at + k]
        logits = self.sent.logits[logit_at : logit_at + len(ids)]
        return RowSlice(ids, logits, np.zeros(0), float(self.sent.logsumexp[source]))
