"""The history of rows that a replica holds."""

from __future__ import annotations

import numpy as np

from actors.coordinator.session import RowHistory
from actors.decoding.candidates import RowSlice
from actors.decoding.cross_vocab.retokenizer import KEPT_ROWS


def part(logsumexp: float) -> RowSlice:
    return RowSlice(np.zeros(0, np.int64), np.zeros(0), np.zeros(0), logsumexp)


def name(position: int) -> tuple[int, int]:
    """Key of a row for a stream whose hash changes with every position."""
    return position, 100 + position


def history(*positions: int) -> RowHistory:
    made = RowHistory()
    for position in positions:
        made.add(name(position), part(float(position)))
    return made


def test_a_row_is_valid_only_while_its_tokens_are_the_sessions() -> None:
    held = history(4, 5)
    assert held.get(name(5)) is not None
    assert held.get((5, 999)) is None, "another token stands there now"
    held.add((5, 999), part(1.0))
    assert held.get(name(5)) is None


def test_reach_is_the_first_position_whose_row_is_not_held() -> None:
    assert history(3, 4, 5).reach(3, 9, name) == 6
    assert history(3, 4, 5).reach(3, 5, name) == 5
    assert history(4).reach(3, 9, name) == 3
    held = history(3, 4, 5, 6)
    assert held.reach(3, 9, lambda position: (position, 100 + position if position < 5 else 0)) == 5


def test_only_rows_without_a_gap_are_kept_and_no_more_than_are_needed() -> None:
    assert history(1, 2, 4, 5).kept(6, name) == 2
    assert history(1, 2, 4, 5).kept(3, name) == 0
    assert history(*range(20)).kept(20, name) == KEPT_ROWS
    assert history(0, 1).kept(2, name) == 2
    assert history(0, 1).kept(0, name) == 0


def test_the_oldest_rows_are_dropped() -> None:
    held = history(*range(500))
    assert held.get(name(0)) is None
    assert held.get(name(499)) is not None


def test_adding_a_row_again_drops_the_rows_behind_it() -> None:
    held = history(4, 5, 6)
    held.add(name(5), part(1.0))
    assert held.get(name(6)) is None
    assert held.reach(4, 9, name) == 6
