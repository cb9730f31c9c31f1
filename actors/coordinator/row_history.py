"""The rows of one session that a replica of another family's small model still holds, and what it said of them."""

from __future__ import annotations

from collections.abc import Callable

from actors.decoding.candidates import Slice
from actors.decoding.cross_vocab.retokenizer import KEPT_ROWS

_LONGEST = 64  # rows that are remembered, whatever the replica holds

NameOf = Callable[[int], tuple[int, int]]  # of a position: itself, and the running hash up to it


class Trail:
    """Slices of rows one after another. A row counts as held while its hash is that of the session's tokens.

    A hash names all tokens up to the row's own, so where one row counts, those before it do too.
    """

    __slots__ = ("_first", "_rows")

    def __init__(self) -> None:
        self._first = 0  # position of the first row
        self._rows: list[tuple[int, Slice]] = []

    def note(self, name: tuple[int, int], part: Slice) -> None:
        """The replica gave this row; it has none of those behind it."""
        position, prefix = name
        at = position - self._first
        if not 0 <= at <= len(self._rows):
            self._first, at = position, 0
        self._rows[at:] = [(prefix, part)]
        if len(self._rows) > 2 * _LONGEST:
            del self._rows[:-_LONGEST]
            self._first = position + 1 - _LONGEST

    def get(self, name: tuple[int, int]) -> Slice | None:
        """What it said of a row; None if it does not hold it."""
        at = name[0] - self._first
        if not 0 <= at < len(self._rows):
            return None
        prefix, part = self._rows[at]
        return part if prefix == name[1] else None

    def reach(self, oldest: int, end: int, name_of: NameOf) -> int:
        """The first position from `oldest` on, up to `end`, whose row is not held."""
        if oldest < self._first:
            return oldest
        position = min(end, self._first + len(self._rows))
        while position > oldest and self.get(name_of(position - 1)) is None:
            position -= 1
        return max(position, oldest)

    def kept(self, position: int, name_of: NameOf) -> int:
        """How many rows directly before a position are held and worth keeping."""
        if position <= self._first or self.get(name_of(position - 1)) is None:
            return 0
        return min(KEPT_ROWS, position - self._first)
