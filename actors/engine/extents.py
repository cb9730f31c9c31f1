"""A first-fit allocator of contiguous ranges of cache rows. It is pure arithmetic and moves no data."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """The rows [start, start + capacity) of a pool."""

    start: int
    capacity: int

    @property
    def end(self) -> int:
        return self.start + self.capacity


class Extents:
    """Hands out extents whose starts and sizes are multiples of `unit` rows.

    Whole units keep every session's cache equally aligned in memory, as bitwise repeatability requires.
    """

    def __init__(self, total: int, unit: int) -> None:
        if unit < 1 or total < unit:
            raise ValueError(f"a pool of {total} rows does not hold one unit of {unit}")
        self.unit = unit
        self.total = total - total % unit
        self._free = [Extent(0, self.total)]  # sorted, never adjacent

    @property
    def free(self) -> int:
        """Free rows, in however many pieces."""
        return sum(hole.capacity for hole in self._free)

    def round(self, rows: int) -> int:
        """`rows` in whole units."""
        return -(-rows // self.unit) * self.unit

    def allocate(self, rows: int) -> Extent | None:
        """The first hole's beginning that fits `rows`, or None."""
        size = self.round(rows)
        for index, hole in enumerate(self._free):
            if hole.capacity >= size:
                self._take(index, size)
                return Extent(hole.start, size)
        return None

    def grow(self, extent: Extent, rows: int) -> Extent | None:
        """`extent` made to hold `rows` in place, or None if the rows behind it are taken."""
        missing = self.round(rows) - extent.capacity
        index = bisect.bisect_left(self._free, Extent(extent.end, 0))
        if index == len(self._free) or self._free[index].start != extent.end or self._free[index].capacity < missing:
            return None
        self._take(index, missing)
        return Extent(extent.start, extent.capacity + missing)

    def release(self, extent: Extent) -> None:
        """Give the rows of `extent` back."""
        index = bisect.bisect_left(self._free, extent)
        self._free.insert(index, extent)
        for left in (index, index - 1):  # with the hole behind it, then with the one before it
            if 0 <= left < len(self._free) - 1 and self._free[left].end == self._free[left + 1].start:
                joined = Extent(self._free[left].start, self._free[left].capacity + self._free[left + 1].capacity)
                self._free[left : left + 2] = [joined]

    def restart(self, taken: int) -> None:
        """Forget every extent: rows [0, taken) are in use, the rest is one hole."""
        taken = self.round(taken)
        self._free = [Extent(taken, self.total - taken)] if taken < self.total else []

    def check(self, used: Iterable[Extent]) -> None:
        """Prove that the used extents and the holes tile the pool exactly once; AssertionError if not."""
        cursor = 0
        for extent in sorted([*used, *self._free]):
            assert extent.start == cursor, f"rows {cursor} to {extent.start} are lost or held twice"
            assert extent.capacity > 0, f"{extent} is empty"
            assert extent.capacity % self.unit == 0, f"{extent} is not in whole units"
            cursor = extent.end
        assert cursor == self.total, f"extents and holes end at {cursor} of {self.total} rows"

    def _take(self, index: int, size: int) -> None:
        hole = self._free[index]
        rest = Extent(hole.start + size, hole.capacity - size)
        self._free[index : index + 1] = [rest] if rest.capacity else []
