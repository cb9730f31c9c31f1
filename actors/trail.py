"""The rows of one session that a replica of another family's small model still holds, and what it said of them."""

from __future__ import annotations

from collections.abc import Callable

from actors.decoding.candidates import Slice
from actors.decoding.vocabulary_reading import KEPT_ROWS

_LONGEST = 64  # rows that are remembered, whatever the replica holds

NameOf = Callable[[int], tuple[int, int]]  # of a position: itself, and the running hash up to it


class Trail:
    """Slices by position. A row counts as held while its hash is that of the session's tokens."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[int, Slice]] = {}

    def note(self, name: tuple[int, int], part: Slice) -> None:
        """The replica gave this row."""
        position, prefix = name
        self._rows.pop(position, None)
        self._rows[position] = prefix, part
        while len(self._rows) > _LONGEST:
            del self._rows[next(iter(self._rows))]

    def get(self, name: tuple[int, int]) -> Slice | None:
        """What it said of a row; None if it does not hold it."""
        held = self._rows.get(name[0])
        return held[1] if held is not None and held[0] == name[1] else None

    def reach(self, oldest: int, end: int, name_of: NameOf) -> int:
        """The first position from `oldest` on, up to `end`, whose row is not held."""
        position = oldest
        while position < end and self.get(name_of(position)) is not None:
            position += 1
        return position

    def kept(self, position: int, name_of: NameOf) -> int:
        """How many rows directly before a position are held and worth keeping."""
        count = 0
        while count < KEPT_ROWS and position > count and self.get(name_of(position - count - 1)) is not None:
            count += 1
        return count
