"""A coordinator's estimate of the free tokens in the replicas' caches."""

from __future__ import annotations

import pytest

from actors.coordinator.cache_budget import GROWTH, CacheBudget, growth, need
from actors.coordinator.session import ActiveSession, CacheWait
from tests.support.unconnected import UnconnectedReplica, request, session

TOTAL = 4_096


def bound(replica: UnconnectedReplica, prompt: int = 160, max_tokens: int | None = None) -> ActiveSession:
    active = session(request(prompt, max_tokens=max_tokens))
    active.bind("target", replica)
    return active


def test_the_reserve_is_bounded_by_max_tokens_and_by_a_small_cache() -> None:
    assert growth(session(request()), TOTAL) == GROWTH
    assert growth(session(request(max_tokens=5)), TOTAL) == 5
    assert growth(session(request()), 1_024) == 64
    assert growth(session(request()), 100) == 16


def test_own_sessions_hold_their_streams_and_a_reserve() -> None:
    replica = UnconnectedReplica(cache_tokens=TOTAL)
    active_sessions = [bound(replica), bound(replica, prompt=161, max_tokens=8)]
    snapshot = CacheBudget(lambda: active_sessions).snapshot()
    assert snapshot.free(replica) == TOTAL - (160 + GROWTH) - (176 + 8)  # whole blocks
    snapshot.take(session(request(32, max_tokens=1)), "target", replica)
    assert snapshot.free(replica) == TOTAL - (160 + GROWTH) - (176 + 8) - 33


def test_the_rest_of_a_heartbeats_usage_is_other_coordinators() -> None:
    replica = UnconnectedReplica(cache_tokens=TOTAL)
    active_sessions = [bound(replica)]
    replica.set_heartbeat(sessions=3, used=160 + 1_000)
    assert CacheBudget(lambda: active_sessions).snapshot().free(replica) == TOTAL - (160 + GROWTH) - 1_000 - 2 * GROWTH


def test_just_released_tokens_are_not_other_coordinators() -> None:
    replica = UnconnectedReplica(cache_tokens=TOTAL)
    active_sessions = [bound(replica, 1_600), bound(replica)]
    room = CacheBudget(lambda: active_sessions)
    room.record()
    replica.set_heartbeat(sessions=2, used=1_760)
    del active_sessions[0]
    assert room.snapshot().free(replica) == TOTAL - (160 + GROWTH)
    for _ in range(6):  # later heartbeats report the same usage: it is another coordinator's
        room.record()
    assert room.snapshot().free(replica) == TOTAL - (160 + GROWTH) - 1_600 - GROWTH


def test_a_replica_without_a_heartbeat_counts_as_unused_by_others() -> None:
    replica = UnconnectedReplica(cache_tokens=TOTAL)
    replica.endpoint = type(replica.endpoint)("target", "", 0, "i")
    assert CacheBudget(list).snapshot().free(replica) == TOTAL


def test_the_first_session_from_here_always_fits() -> None:
    replica, active_sessions = UnconnectedReplica(cache_tokens=256), list[ActiveSession]()
    replica.set_heartbeat(sessions=1, used=256)
    room = CacheBudget(lambda: active_sessions)
    assert room.snapshot().fits(replica, 250)
    active_sessions.append(bound(replica, 16))
    assert not room.snapshot().fits(replica, 16)


def test_a_parked_session_reserves_no_room() -> None:
    replica = UnconnectedReplica(cache_tokens=TOTAL)
    active = bound(replica)
    active.begin()
    active.park("target", CacheWait(0.0, lambda: None))
    assert CacheBudget(lambda: [active]).snapshot().free(replica) == TOTAL


def test_a_prompt_past_a_models_positions_needs_no_room_there() -> None:
    assert need(session(request(100)), "target", UnconnectedReplica(max_position=99)) == 0


@pytest.mark.parametrize("full", [0, 1, 2])
def test_a_session_goes_to_any_replica_with_room(full: int) -> None:
    replicas = [UnconnectedReplica(cache_tokens=512) for _ in range(3)]
    active_sessions = [bound(replica, 400 if number != full else 16) for number, replica in enumerate(replicas)]
    snapshot = CacheBudget(lambda: active_sessions).snapshot()
    active = session(request(300))
    assert all(snapshot.choose(active, "target", replicas) is replicas[full] for _ in range(20))
    snapshot.shut.add(replicas[full])
    assert snapshot.choose(active, "target", replicas) is None
