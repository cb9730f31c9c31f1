"""The admission queue: order of admission, parking, back-pressure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from actors.api.generation import Rejected, Role
from actors.config import ServiceConfig
from actors.coordinator.admission import AdmissionQueue, FairQueue, WaitTimeEstimator
from actors.coordinator.session import ActiveSession
from actors.coordinator.states import SessionState
from tests.support.scripted_service import config
from tests.support.unconnected import UnconnectedReplica, request, session


class Clock:
    """A clock that a test moves by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Place:
    """A coordinator's admitted sessions, and the admission queue `waiting`."""

    def __init__(self, *replicas: UnconnectedReplica, **coordinator: Any) -> None:
        self.clock, self.active_sessions, self.replicas = (
            Clock(),
            dict[int, ActiveSession](),
            replicas or (UnconnectedReplica(),),
        )
        service: ServiceConfig = config(coordinator=coordinator)
        self.waiting = AdmissionQueue(service, self.active_sessions.values, self._usable_replicas, self.clock)

    def _usable_replicas(self, role: Role) -> Sequence[UnconnectedReplica]:
        return [replica for replica in self.replicas if replica.role == role]

    def add(self, *active_sessions: ActiveSession) -> None:
        for active in active_sessions:
            self.waiting.add(active)

    def admit(self) -> list[ActiveSession]:
        begun = []
        for active in self.waiting.admit(lambda active: tuple(active.session.streams)):
            self.active_sessions[active.key] = active
            active.begin()
            begun.append(active)
        return begun

    def end(self, active: ActiveSession) -> None:
        self.active_sessions.pop(active.key, None)
        self.waiting.remove(active)

    def park(self, active: ActiveSession, again: list[ActiveSession], pause_s: float = 0.0) -> None:
        self.waiting.park(active, "target", pause_s, lambda: again.append(active))

    def refused(self, client: str = "") -> Rejected | None:
        return self.waiting.rejection(request(client=client))


def many(count: int, client: str = "", **given: Any) -> list[ActiveSession]:
    return [session(request(client=client, **given)) for _ in range(count)]


async def test_clients_take_turns_and_each_is_served_in_its_order() -> None:
    place = Place(max_sessions=5)
    busy, calm = many(6, "busy"), many(2, "calm")
    place.add(*busy, *calm)
    assert place.admit() == [busy[0], calm[0], busy[1], calm[1], busy[2]]


async def test_a_clients_sessions_go_by_priority_and_then_in_their_order() -> None:
    place = Place(max_sessions=6)
    sessions = [session(request(priority=priority)) for priority in (0, 5, -1, 0, 5, -1)]
    place.add(*sessions)
    assert place.admit() == [sessions[number] for number in (2, 5, 0, 3, 1, 4)]


async def test_a_priority_does_not_pass_other_clients() -> None:
    place = Place(max_sessions=4)
    urgent, calm = many(4, "busy", priority=-100), many(2, "calm", priority=100)
    place.add(*urgent, *calm)
    assert place.admit() == [urgent[0], calm[0], urgent[1], calm[1]]


async def test_admitted_sessions_are_not_displaced_by_more_urgent_ones() -> None:
    place = Place(max_sessions=1)
    place.add(*(first := many(1, priority=9)))
    assert place.admit() == first
    place.add(*many(1, priority=-9))
    assert place.admit() == []


async def test_a_full_queue_displaces_the_least_urgent_session() -> None:
    place = Place(max_sessions=1, max_waiting=2)
    place.add(*many(1))
    place.admit()
    late, urgent = session(request(client="busy", priority=7)), session(request(client="busy"))
    place.add(late, urgent)
    place.add(*many(1, "calm"))
    assert late not in place.waiting
    assert urgent in place.waiting


async def test_places_are_limited_and_come_free() -> None:
    place = Place(max_sessions=2)
    place.add(*(active_sessions := many(3)))
    assert place.admit() == active_sessions[:2]
    assert place.admit() == []
    place.end(active_sessions[0])
    assert place.admit() == active_sessions[2:]


async def test_a_session_waits_until_its_model_has_room() -> None:
    place = Place(UnconnectedReplica(cache_tokens=256))
    place.add(*(active_sessions := many(3, prompt=96)))
    assert place.admit() == active_sessions[:2]  # 96 and 16 to grow by, each
    assert place.active_sessions[active_sessions[1].key].replicas["target"] is place.replicas[0]
    place.end(active_sessions[0])
    assert place.admit() == active_sessions[2:]


async def test_every_role_that_is_needed_must_have_room() -> None:
    place = Place(
        UnconnectedReplica("target", 4_096), UnconnectedReplica("guider", 4_096), UnconnectedReplica("guider_base", 128)
    )
    place.add(*(active_sessions := many(2, prompt=96, guided=True)), *(alone := many(1, "other", prompt=96)))
    assert place.admit() == [active_sessions[0], *alone]
    assert set(active_sessions[0].replicas) == {"target", "guider", "guider_base"}
    assert not active_sessions[1].replicas


async def test_the_first_session_is_admitted_whatever_others_hold() -> None:
    place = Place(UnconnectedReplica(cache_tokens=256))
    place.replicas[0].set_heartbeat(sessions=4, used=256)
    place.add(*(active_sessions := many(2, prompt=96)))
    assert place.admit() == active_sessions[:1]


async def test_a_role_without_a_replica_blocks_no_admission() -> None:
    place = Place(UnconnectedReplica("guider"))
    place.add(*(active_sessions := many(2)))
    assert place.admit() == active_sessions
    assert not active_sessions[0].replicas


async def test_a_prompt_that_no_cache_holds_is_refused_by_its_numbers() -> None:
    rejection = Place(UnconnectedReplica(cache_tokens=256)).waiting.rejection(request(257))
    assert rejection is not None
    assert (rejection.code, rejection.retry_after_s) == ("invalid", None)
    assert "257" in rejection.message
    assert "256" in rejection.message
    assert Place(UnconnectedReplica(cache_tokens=256)).waiting.rejection(request(256)) is None


async def test_a_full_queue_refuses_and_counts_free_places_once() -> None:
    place = Place(max_sessions=2, max_waiting=1)
    for active in many(3):  # two of them will have a place at the next turn
        assert place.refused() is None
        place.add(active)
    assert place.refused() is not None
    place.admit()
    assert len(place.waiting) == 1
    assert place.refused() is not None


async def test_places_without_room_do_not_lengthen_the_queue() -> None:
    place = Place(UnconnectedReplica(cache_tokens=256), max_sessions=64, max_waiting=1)
    place.add(*many(3, prompt=96))
    place.admit()
    assert (len(place.active_sessions), len(place.waiting)) == (2, 1)
    assert place.refused() is not None


async def test_a_new_session_displaces_the_youngest_of_the_busiest_client() -> None:
    place = Place(max_sessions=1, max_waiting=4)
    place.add(*many(1))
    place.admit()
    place.add(*(busy := many(4, "busy")))
    assert place.refused("busy") is not None
    for number in (1, 2):
        assert place.refused("calm") is None
        place.add(*many(1, "calm"))
        (rejected,) = await busy[-number].events.batch()
        assert isinstance(rejected, Rejected)
        assert rejected.code == "overloaded"
        assert rejected.retry_after_s
    assert [active.client for active in place.waiting] == ["busy", "busy", "calm", "calm"]
    assert place.refused("calm") is not None  # they are even


async def test_one_client_alone_meets_a_plain_bounded_queue() -> None:
    queue = FairQueue()
    for active in many(9, "busy"):
        queue.push(active)
    assert queue.displaced_by("busy") is None
    assert queue.displaced_by("calm") is not None


async def test_resumed_sessions_come_first_and_are_never_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(max_sessions=1, max_waiting=1)
    place.add(*many(1))
    place.admit()
    place.add(*(new := many(1)))
    assert place.refused() is not None
    moved = [session(request(), age=age) for age in (7, 5)]
    with monkeypatch.context() as patch:
        patch.setattr(type(moved[0].session.request), "resumed", property(lambda self: self in asked))
        asked = [active.session.request for active in moved]
        assert place.waiting.rejection(asked[0]) is None
        place.add(*moved)
        for expected in (moved[1], moved[0]):
            place.end(next(iter(place.active_sessions.values())))
            assert place.admit() == [expected]
    assert [active.age for active in moved] == [7, 5]  # their age is kept
    place.end(moved[0])
    assert place.admit() == new
    assert new[0].age > 7


async def test_a_parked_session_waits_for_room_ahead_of_queued_ones() -> None:
    place, again = Place(UnconnectedReplica(cache_tokens=256)), list[ActiveSession]()
    place.add(*(active_sessions := many(4, prompt=64)))
    assert place.admit() == active_sessions[:3]
    oldest, _, youngest = active_sessions[:3]
    youngest.session.streams["target"].append([1] * 64)  # it has grown, and there is no room for it any more
    place.park(youngest, again)
    assert place.admit() == []  # and the new one, for which there is, does not overtake it
    assert again == []
    place.end(oldest)
    assert place.admit() == []
    assert again == [youngest]
    assert (youngest.state, youngest.cache_waits) == (SessionState.DECODING, {})


async def test_the_oldest_session_is_never_held_back() -> None:
    place, again = Place(UnconnectedReplica(cache_tokens=256)), list[ActiveSession]()
    place.add(*(active_sessions := many(2, prompt=96)))
    place.admit()
    place.replicas[0].set_heartbeat(sessions=3, used=256)
    for active in active_sessions:
        place.park(active, again)
    assert place.admit() == []
    assert again == active_sessions[:1]


async def test_a_parked_session_pauses_first() -> None:
    place, again = Place(), list[ActiveSession]()
    place.add(*(active_sessions := many(1)))
    place.admit()
    place.park(active_sessions[0], again, pause_s=1.0)
    place.admit()
    place.clock.now += 0.5
    place.waiting.tick()
    place.admit()
    assert (again, place.waiting.parked) == ([], 1)
    place.clock.now += 0.6  # nothing but time has passed
    place.admit()
    assert (again, place.waiting.parked) == (active_sessions, 0)


async def test_a_parked_session_that_begins_another_window_is_not_resumed() -> None:
    place, again = Place(), list[ActiveSession]()
    place.add(*(active_sessions := many(1)))
    place.admit()
    place.park(active_sessions[0], again)
    active_sessions[0].begin()
    place.admit()
    assert (again, place.waiting.parked, active_sessions[0].cache_waits) == ([], 0, {})


async def test_retry_after_follows_from_the_rate_at_which_sessions_end() -> None:
    clock = Clock()
    wait_time = WaitTimeEstimator(clock)
    assert wait_time.wait_s(9) == 1.0  # no session runs
    active_sessions = many(4)
    for active in active_sessions:
        wait_time.began(active)
    clock.now += 2.0
    assert wait_time.wait_s(8) == 4.0  # four run, for two seconds so far
    wait_time.ended(active_sessions[0])
    wait_time.ended(active_sessions[0])
    assert wait_time.wait_s(9) == 6.0  # three run, each takes two
    assert wait_time.wait_s(0) == 1.0
    assert wait_time.wait_s(10_000) == 60.0
    clock.now += 1_000.0  # no session ends: the estimate stays
    assert wait_time.wait_s(9) == 6.0
