"""What forwards are expected to take."""

from __future__ import annotations

import pytest

from actors.coordinator.replica_pool import Pace


def test_what_was_seen_is_expected_again_and_follows_changes() -> None:
    pace = Pace()
    for _ in range(50):
        pace.observe(4, 0.02)
    assert pace.seconds(4) == pytest.approx(0.02)
    for _ in range(50):
        pace.observe(4, 0.04)
    assert pace.seconds(4) == pytest.approx(0.04, rel=0.01)


def test_between_what_was_seen_it_is_interpolated_and_beyond_it_is_the_nearest() -> None:
    pace = Pace()
    assert pace.seconds(3) == 0
    pace.observe(2, 0.01)
    pace.observe(6, 0.03)
    assert pace.seconds(4) == pytest.approx(0.02)
    assert pace.seconds(1) == pytest.approx(0.01)
    assert pace.seconds(500) == pytest.approx(0.03)


def test_sizes_that_cost_alike_share_what_was_seen() -> None:
    pace = Pace()
    pace.observe(1_000, 1.0)
    assert pace.seconds(1_020) == pytest.approx(1.0)
    pace.observe(0, 9.0)  # rows that needed no forward
    assert pace.seconds(1) == pytest.approx(1.0)
