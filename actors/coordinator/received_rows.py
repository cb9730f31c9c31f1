"""The rows of one message of a model replica, located and checked."""

from __future__ import annotations

import numpy as np

from actors.decoding.candidates import Ids, ReceivedColumns, RowSlice, read_only
from actors.decoding.kernels import SentRows, locate_rows
from actors.wire.columns import rows_ids
from actors.wire.ids import page_counts
from actors.wire.messages import WHOLE, ProtocolError, Rows


class ReceivedRows:
    """The rows of a message by number. width: logits in a whole row of this model."""

    def __init__(self, message: Rows, width: int) -> None:
        values = message.logsumexp, message.tempered, message.required
        columns = [read_only(each) for each in (message.ids, message.pages, message.logits, *values)]
        self.items = read_only(message.items)
        self.first_row = np.empty(len(self.items), np.int64)
        starts, pages = np.empty((len(message.logsumexp), 4), np.int64), page_counts(width)
        if not locate_rows(self.items, width, pages, tuple(map(len, columns)), self.first_row, starts):
            raise ProtocolError("the columns of Rows do not fit its items, or one of them has a negative count")
        self.rows: Ids = self.items["rows"]
        self.sent = SentRows(starts, columns[0], columns[1], pages, *columns[2:])
        self._message, self.width = message, width
        self._ids: Ids | None = None  # joined when they are needed

    def check(self, items: Ids, k: int, required: int) -> None:
        """Raise ProtocolError unless these items have slices of k, and so many required logits, as was requested."""
        sent = self.items[items]
        if (sent["k"] != min(k, self.width)).any() or (sent["required_ids"] != required).any():
            raise ProtocolError("a model sent slices of another width, or other required logits, than was requested")

    @property
    def columns(self) -> ReceivedColumns:
        """The message as kernels take it."""
        return ReceivedColumns(self.sent, self.items, self.first_row)

    def slice(self, source: int) -> RowSlice:
        """One row in the model's own ids."""
        k, id_at, logit_at, _ = self.sent.starts[source].tolist()
        if self._ids is None:
            self._ids = rows_ids(self._message, self.width)
        ids = np.arange(self.width) if k == WHOLE else self._ids[id_at : id_at + k]
        logits = self.sent.logits[logit_at : logit_at + len(ids)]
        return RowSlice(ids, logits, np.zeros(0), float(self.sent.logsumexp[source]))
