"""What goes to one model replica in the next frames: one frame of each kind, whatever the number of sessions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.wire.columns import pack_lookups
from actors.wire.messages import DRAFT_ITEM, EXTEND_ITEM, I32, WIDEN_ITEM, Extend, Message, Widen


@dataclass(slots=True)
class Outbox:
    """Items collected during one turn of a coordinator's loop."""

    extends: list[tuple[int, ...]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    know: list[NDArray[Any]] = field(default_factory=list)
    drafting: list[tuple[float, ...]] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    lookups: list[tuple[int, ...]] = field(default_factory=list)
    ids: list[NDArray[Any]] = field(default_factory=list)
    widens: list[tuple[int, ...]] = field(default_factory=list)

    def take(self, width: int) -> list[Message]:
        """The frames to send now, in order; the outbox is empty afterwards. width: of the model's rows."""
        messages: list[Message] = []
        if not (self.extends or self.released or self.lookups or self.widens):
            return messages
        if self.extends or self.released:
            items, drafting = np.array(self.extends, EXTEND_ITEM), np.array(self.drafting, DRAFT_ITEM)
            released = np.array(self.released, "<u8")
            messages.append(Extend(items, np.array(self.tokens, I32), _joined(self.know), released, drafting))
        if self.lookups:
            messages.append(pack_lookups(self.lookups, _joined(self.ids), width))
        if self.widens:
            messages.append(Widen(np.array(self.widens, WIDEN_ITEM)))
        columns = (
            self.extends,
            self.tokens,
            self.know,
            self.drafting,
            self.released,
            self.lookups,
            self.ids,
            self.widens,
        )
        for column in columns:
            column.clear()
        return messages


def _joined(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    if len(arrays) == 1:
        return arrays[0].astype(I32, copy=False)
    return np.concatenate(arrays).astype(I32, copy=False) if arrays else np.zeros(0, I32)
