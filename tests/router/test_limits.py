"""Limits per key: requests per minute and open requests, independent of other keys."""

from __future__ import annotations

import pytest

from actors.config import LimitsConfig
from router.backend import Overloaded
from router.limits import Bucket, Limits


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def wait_s(limits: Limits, name: str) -> float:
    with pytest.raises(Overloaded) as raised:
        limits.enter(name)
    assert raised.value.code == "rate_limit_exceeded"
    assert raised.value.retry_after_s is not None
    return raised.value.retry_after_s


def test_a_bucket_allows_a_minutes_burst_then_the_rate() -> None:
    clock = Clock()
    bucket = Bucket(30, clock)
    assert [bucket.take() for _ in range(30)] == [0.0] * 30
    assert bucket.take() == pytest.approx(2.0)
    clock.now += 1.5
    assert bucket.take() == pytest.approx(0.5)
    clock.now += 0.5
    assert bucket.take() == 0.0
    assert bucket.take() == pytest.approx(2.0)


def test_a_bucket_holds_a_minutes_worth_at_most() -> None:
    clock = Clock()
    bucket = Bucket(3, clock)
    clock.now += 3_600
    assert [bucket.take() for _ in range(4)] == [0.0, 0.0, 0.0, pytest.approx(20.0)]


@pytest.mark.parametrize("per_minute", [0.3, 0.7, 7, 90, 1_000])
def test_waiting_for_retry_after_is_enough(per_minute: float) -> None:
    clock = Clock()
    bucket = Bucket(per_minute, clock)
    for _ in range(200):
        if wait := bucket.take():
            clock.now += wait
            assert bucket.take() == 0.0


def test_the_long_term_rate_is_the_limit() -> None:
    clock = Clock()
    bucket = Bucket(60, clock)
    taken = 0
    for _ in range(6_000):
        clock.now += 0.1
        taken += bucket.take() == 0.0
    assert taken == pytest.approx(660, abs=1)  # ten minutes of refill and the bucket's initial content


def test_each_key_has_its_own_rate() -> None:
    limits = Limits(LimitsConfig(requests_per_minute=1), Clock())
    limits.enter("ada")
    assert wait_s(limits, "ada") == pytest.approx(60.0)
    limits.enter("eve")


def test_a_finished_request_frees_its_place() -> None:
    limits = Limits(LimitsConfig(open_requests=2), Clock())
    limits.enter("ada")
    limits.enter("ada")
    assert wait_s(limits, "ada") > 0
    limits.enter("eve")
    limits.leave("ada")
    limits.enter("ada")
    assert wait_s(limits, "ada") > 0


def test_a_request_refused_for_open_requests_costs_no_rate() -> None:
    limits = Limits(LimitsConfig(open_requests=1, requests_per_minute=2), Clock())
    limits.enter("ada")
    for _ in range(5):
        wait_s(limits, "ada")
    limits.leave("ada")
    limits.enter("ada")


def test_a_request_refused_for_its_rate_takes_no_place() -> None:
    clock = Clock()
    limits = Limits(LimitsConfig(open_requests=1, requests_per_minute=1), clock)
    limits.enter("ada")
    limits.leave("ada")
    assert wait_s(limits, "ada") == pytest.approx(60.0)
    clock.now += 60
    limits.enter("ada")


def test_without_limits_every_request_is_accepted() -> None:
    limits = Limits(LimitsConfig(), Clock())
    for _ in range(10_000):
        limits.enter("ada")
