"""What one coordinator takes to be free in the models' caches."""

from __future__ import annotations

import pytest

from actors.coordinator.cache_budget import GROWTH, CacheBudget, growth, need
from actors.coordinator.session import ActiveSession, CacheWait
from tests.support.crowd import Unreached, request, session

TOTAL = 4_096


def bound(replica: Unreached, prompt: int = 160, max_tokens: int | None = None) -> ActiveSession:
    active = session(request(prompt, max_tokens=max_tokens))
    active.bind("target", replica)
    return active


def test_growth_is_what_a_session_may_still_say_and_no_large_part_of_a_small_cache() -> None:
    assert growth(session(request()), TOTAL) == GROWTH
    assert growth(session(request(max_tokens=5)), TOTAL) == 5
    assert growth(session(request()), 1_024) == 64
    assert growth(session(request()), 100) == 16


def test_own_sessions_hold_their_streams_and_keep_room_to_grow() -> None:
    replica = Unreached(cache_tokens=TOTAL)
    active_sessions = [bound(replica), bound(replica, prompt=161, max_tokens=8)]
    snapshot = CacheBudget(lambda: active_sessions).snapshot()
    assert snapshot.free(replica) == TOTAL - (160 + GROWTH) - (176 + 8)  # whole blocks
    snapshot.take(session(request(32, max_tokens=1)), "target", replica)
    assert snapshot.free(replica) == TOTAL - (160 + GROWTH) - (176 + 8) - 33


def test_what_others_hold_is_what_the_heartbeat_has_beside_ones_own() -> None:
    replica = Unreached(cache_tokens=TOTAL)
    active_sessions = [bound(replica)]
    replica.says(sessions=3, used=160 + 1_000)
    assert CacheBudget(lambda: active_sessions).snapshot().free(replica) == TOTAL - (160 + GROWTH) - 1_000 - 2 * GROWTH


def test_what_has_just_been_released_is_nobody_elses() -> None:
    replica = Unreached(cache_tokens=TOTAL)
    active_sessions = [bound(replica, 1_600), bound(replica)]
    room = CacheBudget(lambda: active_sessions)
    room.note()
    replica.says(sessions=2, used=1_760)
    del active_sessions[0]
    assert room.snapshot().free(replica) == TOTAL - (160 + GROWTH)
    for _ in range(6):  # the heartbeats since say the same: now it is somebody's
        room.note()
    assert room.snapshot().free(replica) == TOTAL - (160 + GROWTH) - 1_600 - GROWTH


def test_a_replica_that_does_not_tell_its_use_holds_nothing_of_others() -> None:
    replica = Unreached(cache_tokens=TOTAL)
    replica.endpoint = type(replica.endpoint)("target", "", 0, "i")
    assert CacheBudget(list).snapshot().free(replica) == TOTAL


def test_the_first_session_from_here_always_fits() -> None:
    replica, active_sessions = Unreached(cache_tokens=256), list[ActiveSession]()
    replica.says(sessions=1, used=256)
    room = CacheBudget(lambda: active_sessions)
    assert room.snapshot().fits(replica, 250)
    active_sessions.append(bound(replica, 16))
    assert not room.snapshot().fits(replica, 16)


def test_a_session_that_lost_its_cache_keeps_no_room() -> None:
    replica = Unreached(cache_tokens=TOTAL)
    active = bound(replica)
    active.begin()
    active.park("target", CacheWait(0.0, lambda: None))
    assert CacheBudget(lambda: [active]).snapshot().free(replica) == TOTAL


def test_a_prompt_past_a_models_positions_asks_for_no_room_there() -> None:
    assert need(session(request(100)), "target", Unreached(max_position=99)) == 0


@pytest.mark.parametrize("full", [0, 1, 2])
def test_a_session_goes_wherever_there_is_room(full: int) -> None:
    replicas = [Unreached(cache_tokens=512) for _ in range(3)]
    active_sessions = [bound(replica, 400 if number != full else 16) for number, replica in enumerate(replicas)]
    snapshot = CacheBudget(lambda: active_sessions).snapshot()
    active = session(request(300))
    assert all(snapshot.choose(active, "target", replicas) is replicas[full] for _ in range(20))
    snapshot.shut.add(replicas[full])
    assert snapshot.choose(active, "target", replicas) is None
