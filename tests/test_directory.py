"""The directory: registration, expiry, and the progress of loading replicas."""

from __future__ import annotations

from dataclasses import replace

import pytest

from actors.api.generation import ROLES
from actors.directory import EXPIRY_S, HEARTBEAT_S, Directory, Endpoint, Loading


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def directory(clock: Clock) -> Directory:
    return Directory(clock)


TARGET = Endpoint("target", "127.0.0.1", 4000, "a1", sessions=0, cache_free=1_000)


def test_the_first_heartbeat_registers_and_later_ones_update_the_load(directory: Directory) -> None:
    directory.heartbeat(TARGET)
    directory.heartbeat(replace(TARGET, sessions=3, cache_free=400))
    assert directory.snapshot() == (replace(TARGET, sessions=3, cache_free=400),)


def test_a_silent_replica_expires_after_a_few_missed_heartbeats(directory: Directory, clock: Clock) -> None:
    directory.heartbeat(TARGET)
    clock.now += 3 * HEARTBEAT_S
    assert directory.snapshot() == (TARGET,)
    clock.now += EXPIRY_S
    assert directory.snapshot() == ()


def test_a_restarted_replica_is_listed_beside_its_expiring_predecessor(directory: Directory, clock: Clock) -> None:
    directory.heartbeat(TARGET)
    clock.now += EXPIRY_S / 2
    reborn = replace(TARGET, incarnation="b2")
    directory.heartbeat(reborn)
    assert set(directory.snapshot()) == {TARGET, reborn}
    clock.now += EXPIRY_S * 0.75
    assert directory.snapshot() == (reborn,)


def test_a_replica_that_leaves_is_removed_at_once_and_may_leave_twice(directory: Directory) -> None:
    directory.heartbeat(TARGET)
    directory.leave("a1")
    directory.leave("a1")
    assert directory.snapshot() == ()


def test_a_stopping_replica_is_listed_but_does_not_serve_its_role(directory: Directory) -> None:
    directory.heartbeat(replace(TARGET, stopping=True))
    assert directory.snapshot()[0].stopping
    assert "target" in directory.awaited()


def test_every_role_without_a_replica_is_awaited_with_its_progress(directory: Directory) -> None:
    assert set(directory.awaited()) == set(ROLES)
    directory.heartbeat(TARGET)
    directory.loading(Loading("guider", "g1", "loading 65.0 GB of weights", 12.3))
    assert directory.awaited() == {
        "guider": "loading 65.0 GB of weights, 12 s since it started",
        "guider_base": "no replica has started",
    }


def test_progress_ends_with_the_first_heartbeat_or_with_silence(directory: Directory, clock: Clock) -> None:
    directory.loading(Loading("target", "a1", "fetching weights", 1.0))
    directory.heartbeat(TARGET)
    assert "target" not in directory.awaited()
    directory.loading(Loading("guider", "g1", "fetching weights", 1.0))
    clock.now += EXPIRY_S + 1
    assert directory.awaited()["guider"] == "no replica has started"
