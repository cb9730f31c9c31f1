"""The delay before a forward, with a simulated clock."""

import pytest

from actors.replica.batching_delay import BatchingDelay


def teach(window: BatchingDelay, peer: str, takes: float, rounds: int = 20) -> None:
    """Answer `peer` several times, and let its next extend arrive `takes` seconds later."""
    for now in range(rounds):
        window.answered(peer, now)
        window.arrived(peer, now + takes)


@pytest.fixture
def window() -> BatchingDelay:
    window = BatchingDelay(share=0.5, cap_s=0.02)
    window.forward_took(0.010)
    return window


def test_a_single_coordinator_never_waits(window: BatchingDelay) -> None:
    teach(window, "a", 0.002)
    window.answered("a", 100.0)
    window.arrived("a", 100.002)
    assert window.wait_until(100.002, 100.002) is None


def test_an_answered_coordinator_is_awaited_until_it_is_late(window: BatchingDelay) -> None:
    for peer in "ab":
        teach(window, peer, 0.002)
        window.answered(peer, 100.0)
    window.arrived("a", 100.002)
    until = window.wait_until(100.002, 100.002)
    assert until is not None
    assert 100.002 < until < 100.004
    assert window.wait_until(100.002, until) is None
    window.arrived("b", 100.0021)
    assert window.wait_until(100.002, 100.0021) is None


def test_a_slow_coordinator_is_not_awaited(window: BatchingDelay) -> None:
    teach(window, "slow", 0.015)
    window.answered("slow", 100.0)
    assert window.wait_until(100.002, 100.002) is None
    assert window.wait_until(100.012, 100.012) is not None  # late before the longest delay ends


def test_the_cap_limits_the_delay_of_long_forwards() -> None:
    window = BatchingDelay(share=0.5, cap_s=0.001)
    window.forward_took(10.0)
    teach(window, "b", 0.5)
    window.answered("b", 100.0)
    assert window.wait_until(100.0, 100.0) is None


def test_a_new_or_forgotten_coordinator_is_not_awaited(window: BatchingDelay) -> None:
    window.answered("new", 100.0)
    assert window.wait_until(100.0, 100.0) is None
    teach(window, "gone", 0.002)
    window.answered("gone", 100.0)
    window.forget("gone")
    assert window.wait_until(100.0, 100.0) is None


def test_the_wait_ends_with_the_latest_expected_coordinator(window: BatchingDelay) -> None:
    teach(window, "b", 0.002)
    teach(window, "c", 0.003)
    for peer in "bc":
        window.answered(peer, 100.0)
    until = window.wait_until(100.0, 100.0)
    assert until is not None
    assert until > 100.003


@pytest.mark.parametrize(("share", "cap_s"), [(0.0, 1.0), (1.0, 0.0)])
def test_a_delay_of_zero_never_waits(share: float, cap_s: float) -> None:
    window = BatchingDelay(share, cap_s)
    window.forward_took(1.0)
    teach(window, "b", 0.002)
    window.answered("b", 100.0)
    assert window.wait_until(100.0, 100.0) is None


def test_a_changed_response_time_is_learned(window: BatchingDelay) -> None:
    teach(window, "b", 0.004)
    teach(window, "b", 0.001, rounds=60)
    window.answered("b", 100.0)
    until = window.wait_until(100.0, 100.0)
    assert until is not None
    assert until < 100.002
