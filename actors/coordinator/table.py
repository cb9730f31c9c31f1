"""The admitted sessions of a coordinator as rows of one array, from which frames are filled by indexing."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.decoding.kernels import SESSION


class SessionTable:
    """Sessions by slot. A session has its slot from its admission to its end."""

    def __init__(self) -> None:
        self.rows = np.zeros(64, SESSION)
        self._free = list(range(len(self.rows)))[::-1]

    def add(self, key: int, age: int, epoch: int, spec: NDArray[Any]) -> int:
        """Store a session; return its slot. spec [1]: its sampling parameters."""
        if not self._free:
            size = len(self.rows)
            self.rows = np.concatenate([self.rows, np.zeros(size, SESSION)])
            self._free = list(range(size, 2 * size))[::-1]
        slot = self._free.pop()
        self.rows[slot] = key, age, epoch, spec[0]
        return slot

    def remove(self, slot: int) -> None:
        """Free a slot for another session."""
        self._free.append(slot)
