"""Estimates of the time of forwards."""

from __future__ import annotations

import pytest

from actors.coordinator.replica_pool import ForwardTimeModel


def test_estimates_follow_observed_times_and_their_changes() -> None:
    forward_time = ForwardTimeModel()
    for _ in range(50):
        forward_time.observe(4, 0.02)
    assert forward_time.seconds(4) == pytest.approx(0.02)
    for _ in range(50):
        forward_time.observe(4, 0.04)
    assert forward_time.seconds(4) == pytest.approx(0.04, rel=0.01)


def test_estimates_are_interpolated_and_constant_beyond_observations() -> None:
    forward_time = ForwardTimeModel()
    assert forward_time.seconds(3) == 0
    forward_time.observe(2, 0.01)
    forward_time.observe(6, 0.03)
    assert forward_time.seconds(4) == pytest.approx(0.02)
    assert forward_time.seconds(1) == pytest.approx(0.01)
    assert forward_time.seconds(500) == pytest.approx(0.03)


def test_sizes_in_one_bucket_share_their_observations() -> None:
    forward_time = ForwardTimeModel()
    forward_time.observe(1_000, 1.0)
    assert forward_time.seconds(1_020) == pytest.approx(1.0)
    forward_time.observe(0, 9.0)  # rows that needed no forward
    assert forward_time.seconds(1) == pytest.approx(1.0)
