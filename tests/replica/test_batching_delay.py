import pytest

from actors.replica.batching_delay import BatchingDelay


def habit(window: BatchingDelay, peer: str, takes: float, rounds: int = 20) -> None:
    """Teach the window that `peer` comes back `takes` seconds after an answer."""
    for now in range(rounds):
        window.answered(peer, now)
        window.arrived(peer, now + takes)


@pytest.fixture
def window() -> BatchingDelay:
    window = BatchingDelay(share=0.5, cap_s=0.02)
    window.forward_took(0.010)
    return window


def test_a_lone_coordinator_never_waits(window: BatchingDelay) -> None:
    habit(window, "a", 0.002)
    window.answered("a", 100.0)
    window.arrived("a", 100.002)
    assert window.wait_until(100.002, 100.002) is None


def test_a_coordinator_that_was_answered_too_is_waited_for_until_it_is_late(window: BatchingDelay) -> None:
    for peer in "ab":
        habit(window, peer, 0.002)
        window.answered(peer, 100.0)
    window.arrived("a", 100.002)
    until = window.wait_until(100.002, 100.002)
    assert until is not None
    assert 100.002 < until < 100.004
    assert window.wait_until(100.002, until) is None
    window.arrived("b", 100.0021)
    assert window.wait_until(100.002, 100.0021) is None


def test_one_that_takes_longer_than_a_share_of_a_forward_is_not_waited_for(window: BatchingDelay) -> None:
    habit(window, "slow", 0.015)
    window.answered("slow", 100.0)
    assert window.wait_until(100.002, 100.002) is None
    assert window.wait_until(100.012, 100.012) is not None  # due within the window by then


def test_the_cap_holds_however_long_forwards_are() -> None:
    window = BatchingDelay(share=0.5, cap_s=0.001)
    window.forward_took(10.0)
    habit(window, "b", 0.5)
    window.answered("b", 100.0)
    assert window.wait_until(100.0, 100.0) is None


def test_a_new_or_forgotten_coordinator_is_not_waited_for(window: BatchingDelay) -> None:
    window.answered("new", 100.0)
    assert window.wait_until(100.0, 100.0) is None
    habit(window, "gone", 0.002)
    window.answered("gone", 100.0)
    window.forget("gone")
    assert window.wait_until(100.0, 100.0) is None


def test_the_latest_of_those_due_ends_the_wait(window: BatchingDelay) -> None:
    habit(window, "b", 0.002)
    habit(window, "c", 0.003)
    for peer in "bc":
        window.answered(peer, 100.0)
    until = window.wait_until(100.0, 100.0)
    assert until is not None
    assert until > 100.003


@pytest.mark.parametrize(("share", "cap_s"), [(0.0, 1.0), (1.0, 0.0)])
def test_a_window_of_zero_never_waits(share: float, cap_s: float) -> None:
    window = BatchingDelay(share, cap_s)
    window.forward_took(1.0)
    habit(window, "b", 0.002)
    window.answered("b", 100.0)
    assert window.wait_until(100.0, 100.0) is None


def test_a_habit_that_changes_is_learnt_anew(window: BatchingDelay) -> None:
    habit(window, "b", 0.004)
    habit(window, "b", 0.001, rounds=60)
    window.answered("b", 100.0)
    until = window.wait_until(100.0, 100.0)
    assert until is not None
    assert until < 100.002
