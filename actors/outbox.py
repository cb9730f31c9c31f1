"""What goes to one model replica in the next frames: one frame of each kind, whatever the number of sessions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.wire.messages import EXTEND_ITEM, LOOKUP_ITEM, WIDEN_ITEM, Extend, Lookup, Message, Widen


@dataclass(slots=True)
class Outbox:
    """Items collected during one turn of a coordinator's loop."""

    extends: list[tuple[int, ...]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    know: list[NDArray[Any]] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    lookups: list[tuple[int, ...]] = field(default_factory=list)
    ids: list[NDArray[Any]] = field(default_factory=list)
    widens: list[tuple[int, ...]] = field(default_factory=list)

    def take(self) -> list[Message]:
        """The frames to send now, in order; the outbox is empty afterwards."""
        messages: list[Message] = []
        if not (self.extends or self.released or self.lookups or self.widens):
            return messages
        if self.extends or self.released:
            items = np.array(self.extends, EXTEND_ITEM)
            released = np.array(self.released, "<u8")
            messages.append(Extend(items, np.array(self.tokens, "<i4"), _joined(self.know), released))
        if self.lookups:
            messages.append(Lookup(np.array(self.lookups, LOOKUP_ITEM), _joined(self.ids)))
        if self.widens:
            messages.append(Widen(np.array(self.widens, WIDEN_ITEM)))
        for column in (self.extends, self.tokens, self.know, self.released, self.lookups, self.ids, self.widens):
            column.clear()
        return messages


def _joined(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(arrays).astype("<i4") if arrays else np.zeros(0, "<i4")
