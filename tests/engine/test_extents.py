from __future__ import annotations

import random

import pytest

from actors.engine.extents import Extent, Extents


def test_extents_are_whole_units() -> None:
    extents = Extents(100, 32)
    assert extents.total == 96
    assert extents.allocate(1) == Extent(0, 32)
    assert extents.allocate(33) == Extent(32, 64)
    assert extents.allocate(1) is None


def test_an_extent_grows_into_the_hole_behind_it_only() -> None:
    extents = Extents(128, 32)
    first, second = extents.allocate(32), extents.allocate(32)
    assert first is not None
    assert second is not None
    assert extents.grow(first, 33) is None
    assert extents.grow(second, 96) == Extent(32, 96)
    assert extents.free == 0


def test_released_neighbours_become_one_hole() -> None:
    extents = Extents(96, 32)
    parts = [extents.allocate(32) for _ in range(3)]
    for part in (parts[0], parts[2], parts[1]):
        assert part is not None
        extents.release(part)
    assert extents.allocate(96) == Extent(0, 96)


def test_a_pool_smaller_than_a_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="does not hold one unit"):
        Extents(31, 32)


def test_free_and_used_rows_add_up_after_any_history() -> None:
    draw = random.Random(0)
    extents, used = Extents(1024, 16), list[Extent]()
    for _ in range(2000):
        kind = draw.random()
        if used and kind < 0.4:
            extents.release(used.pop(draw.randrange(len(used))))
        elif used and kind < 0.6:
            index = draw.randrange(len(used))
            used[index] = extents.grow(used[index], used[index].capacity + draw.randint(1, 40)) or used[index]
        elif (extent := extents.allocate(draw.randint(1, 120))) is not None:
            used.append(extent)
        extents.check(used)
        assert extents.free + sum(extent.capacity for extent in used) == extents.total


def test_a_lost_extent_is_noticed() -> None:
    extents = Extents(96, 32)
    extents.allocate(32)
    with pytest.raises(AssertionError, match="lost or held twice"):
        extents.check([])
