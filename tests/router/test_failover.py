"""Sessions that go on elsewhere: coordinators that die, hang or hand over, and model replicas that are stopped."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from actors.api.generation import (
    CoordinatorEvent,
    Delta,
    Finished,
    Generate,
    Moved,
    PromptNote,
    Rejected,
    Resume,
    Role,
    Tally,
    Usage,
)
from actors.api.guidance import Guidance
from actors.api.sampling_params import Thinking
from actors.config import Deadlines
from actors.coordinator.coordinator import Coordinator
from actors.directory import Endpoint
from actors.replica.build import load_role, serve_role
from actors.replica.engine_thread import Engine
from router import failover as resume
from router.backend import Status, Unavailable
from router.failover import MAX_LOSSES, Resuming
from tests.support.local_service import Answer, LocalService, local_service, trio_config
from tests.support.scripted_service import usage
from tests.support.tiers import slow
from tests.support.trio import (
    GREEDY,
    LONG,
    SAMPLED,
    TEXT,
    alone,
    chat_prompts,
    decode_all,
    finished,
    mixed_requests,
    request,
    tokens,
)
from tests.support.watched import Trio, until, watched


@pytest.fixture
def trio(trio_engines: Mapping[Role, Engine]) -> Iterator[Trio]:
    with watched(trio_engines) as trio:
        yield trio


class Fleet:
    """Coordinators of one service, of which any may be killed, hung or told to go in the middle of a stream."""

    def __init__(self, service: LocalService) -> None:
        self._service = service
        self.hung: set[Coordinator] = set()
        self.dead: set[Coordinator] = set()
        self.leaving: set[Coordinator] = set()
        self.short_lived: int | None = None  # so many messages, and the coordinator is lost to its stream
        self.asked: list[Generate] = []

    async def generate(self, request: Generate) -> AsyncIterator[CoordinatorEvent]:
        """As Serve would: whoever is there, and an error when its process dies."""
        said = 0
        living = [c for c in self._service.coordinators if c not in self.dead | self.leaving]
        coordinator = min(living, key=lambda c: (c in self.hung, c.load().sessions))
        self.asked.append(request)
        async with aclosing(coordinator.generate(request)) as events:
            async for event in events:
                if coordinator in self.hung:
                    await asyncio.sleep(3600)
                if coordinator in self.dead or said == self.short_lived:
                    raise LOST
                yield event
                said += 1

    def busy(self) -> Iterator[Coordinator]:
        """Those that live and decode."""
        return (c for c in self._service.coordinators if c not in self.dead and c.load().sessions)

    async def status(self) -> Status:
        return Status()

    async def ending(self) -> bool:
        return False


@asynccontextmanager
async def fleet(
    engines: Mapping[Role, Engine], coordinators: int = 2, **deadlines: float
) -> AsyncIterator[tuple[LocalService, Fleet, Resuming]]:
    config = trio_config(deadlines=deadlines)
    async with local_service(config, engines, coordinators) as service:
        those = Fleet(service)
        yield service, those, Resuming(those, config.deadlines)


async def answer(backend: Resuming, one: Generate) -> Answer:
    """One request to its end."""
    came = Answer()
    async for event in backend.generate(one):
        if isinstance(event, Delta):
            came.reasoning, came.content = came.reasoning + event.reasoning, came.content + event.content
            came.tokens += event.tokens
        else:
            came.end = event
    return came


async def both(backend: Resuming, requests: Sequence[Generate], disturb: Any) -> tuple[list[Answer], list[Answer]]:
    """The answers undisturbed, and those while `disturb()` does its work."""
    calm = [await answer(backend, one) for one in requests]
    running = [asyncio.create_task(answer(backend, one)) for one in requests]
    await disturb()
    return calm, list(await asyncio.gather(*running))


def answered(usage: Usage) -> Usage:
    return replace(usage, drafted_tokens=0, accepted_tokens=0, widened_rows=0, uncovered_mass=0.0)


def same(first: Sequence[Answer], second: Sequence[Answer]) -> None:
    """Tokens and texts are the same, and the counts but for those of work: drafts, and rows that were widened twice."""
    assert [(a.tokens, a.reasoning, a.content) for a in first] == [(a.tokens, a.reasoning, a.content) for a in second]
    for one, other in zip(first, second, strict=True):
        assert isinstance(one.end, Finished)
        assert isinstance(other.end, Finished)
        assert answered(one.end.usage) == answered(other.end.usage)
        assert one.end.usage.uncovered_mass == pytest.approx(other.end.usage.uncovered_mass)
        assert (one.end.reason, one.end.stop_reason) == (other.end.reason, other.end.stop_reason)


async def working(coordinator: Coordinator, tokens: int = 20) -> None:
    """The coordinator has sessions and has decided so many more tokens."""
    begun = coordinator.load().tokens
    await until(lambda: coordinator.load().sessions > 0 and coordinator.load().tokens >= begun + tokens)


def demanding_requests(service: LocalService) -> list[Generate]:
    """Requests whose next token depends on much of what was said: forced ends, waits, penalties, stops, schedules."""
    ways: list[dict[str, Any]] = [
        {"thinking": Thinking("<think>", "</think>", max_tokens=12)},
        {"thinking": Thinking("<think>", "</think>", min_tokens=25, wait=" Wait, "), "sampling": GREEDY},
        {"sampling": replace(LONG, max_tokens=60, presence_penalty=0.7, frequency_penalty=0.3)},
        {"sampling": replace(LONG, max_tokens=60, repetition_penalty=0.8, stop=("mentor of",))},
        {"guidance": Guidance(1.0, schedule=((0, 0.0), (9, 1.0), (30, 0.5))), "sampling": replace(LONG, max_tokens=50)},
        {"explain": True, "sampling": replace(SAMPLED, min_tokens=20)},
    ]
    texts = chat_prompts(len(ways))
    return [
        request(service.tokenizers, text, seed=i, **way) for i, (text, way) in enumerate(zip(texts, ways, strict=True))
    ]


async def test_coordinators_that_die_change_no_answer(trio_engines: Mapping[Role, Engine]) -> None:
    async with fleet(trio_engines, coordinators=4) as (service, those, backend):

        async def kill() -> None:
            for _ in range(2):
                await until(lambda: any(those.busy()))
                victim = next(those.busy())
                await working(victim, 5)
                those.dead.add(victim)

        same(*await both(backend, mixed_requests(service, 8), kill))
        assert any(one.resume is not None and one.resume.choices for one in those.asked)


async def test_whatever_an_answer_depends_on_is_carried_over_any_number_of_times(
    trio_engines: Mapping[Role, Engine],
) -> None:
    async with fleet(trio_engines) as (service, those, backend):
        requests = demanding_requests(service)
        calm = [await answer(backend, one) for one in requests]
        those.short_lived = 3
        same(calm, await asyncio.gather(*(answer(backend, one) for one in requests)))
        assert len(those.asked) > 4 * len(requests)


async def test_a_coordinator_that_hangs_is_left_within_the_silence_deadline(
    trio_engines: Mapping[Role, Engine],
) -> None:
    async with fleet(trio_engines, peer_timeout_s=1.0) as (service, those, backend):

        async def hang() -> None:
            coordinator = service.coordinators[0]
            await working(coordinator)
            those.hung.add(coordinator)

        same(*await both(backend, mixed_requests(service, 4), hang))


async def test_a_coordinator_that_hands_over_keeps_no_session_and_takes_none(
    trio_engines: Mapping[Role, Engine],
) -> None:
    async with fleet(trio_engines) as (service, those, backend):
        leaving = service.coordinators[0]

        async def hand_over() -> None:
            await working(leaving)
            those.leaving.add(leaving)
            leaving.hand_over()
            assert leaving.load().sessions == 0

        same(*await both(backend, mixed_requests(service, 6), hand_over))
        assert [event async for event in leaving.generate(mixed_requests(service, 1)[0])] == [Moved()]


async def test_an_answer_that_was_complete_but_for_its_end_is_ended_at_once(
    trio_engines: Mapping[Role, Engine],
) -> None:
    async with local_service(trio_config(), trio_engines) as service:
        one = request(service.tokenizers, TEXT)
        whole = [event async for event in service.coordinators[0].generate(one)]
        choices = [choice for event in whole if isinstance(event, Delta) for choice in event.choices]
        again = replace(one, resume=Resume(choices, Tally(guided=7)))
        (end,) = [event async for event in service.coordinators[0].generate(again)]
        assert isinstance(end, Finished)
        assert (end.reason, end.usage.completion_tokens, end.usage.guided_tokens) == ("stop", len(choices), 7)


async def test_a_stream_that_is_slow_says_that_it_lives(trio: Trio) -> None:
    free = threading.Event()
    async with fleet(trio.engines, peer_timeout_s=0.3) as (service, those, backend):
        trio.disturb(lambda engine: (free.wait(10), None)[1], "target")
        running = asyncio.create_task(answer(backend, request(service.tokenizers, TEXT)))
        await asyncio.sleep(1.0)
        free.set()
        assert finished(await running).reason == "stop"
        assert len(those.asked) == 1


class Scripted:
    """Coordinators that fail as told: each attempt plays the next list of events, an exception ends it."""

    def __init__(self, *attempts: Sequence[CoordinatorEvent | Exception], ends: bool = False) -> None:
        self._attempts, self._ends = list(attempts), ends
        self.asked: list[Generate] = []

    async def generate(self, request: Generate) -> AsyncIterator[CoordinatorEvent]:
        self.asked.append(request)
        for event in self._attempts.pop(0) if len(self._attempts) > 1 else self._attempts[0]:
            if isinstance(event, Exception):
                raise event
            yield event

    async def status(self) -> Status:
        return Status()

    async def ending(self) -> bool:
        return self._ends


LOST = Unavailable("its coordinator was lost")
ANY = Generate("r", "target", {"target": [1]}, GREEDY, Guidance(0.0), Thinking(), 1)
END = Finished("stop", usage(ANY, 2))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between attempts are short."""
    monkeypatch.setattr(resume, "_LONGEST_PAUSE_S", 0.001)


def token(choice: int) -> Delta:
    return Delta(content=f" {choice}", tokens=[choice], choices=[choice], tally=Tally(guided=choice))


async def test_what_was_said_is_passed_on_and_not_said_again(impatient: None) -> None:
    those = Scripted([token(1), LOST], [token(2), Moved()], [token(3)], [END])
    events = [event async for event in Resuming(those, Deadlines()).generate(ANY)]
    assert events == [
        Delta(content=" 1", tokens=[1]),
        Delta(content=" 2", tokens=[2]),
        Delta(content=" 3", tokens=[3]),
        END,
    ]
    assert [one.resume for one in those.asked] == [
        None,
        Resume([1], Tally(guided=1)),
        Resume([1, 2], Tally(guided=2)),
        Resume([1, 2, 3], Tally(guided=3)),
    ]
    assert {one.arrived for one in those.asked} == {ANY.arrived}


async def test_the_log_probabilities_of_a_prompt_are_not_told_twice(impatient: None) -> None:
    notes = [PromptNote(number, -1.0) for number in range(3)]
    those = Scripted(
        [Delta(prompt=notes[:1], tally=Tally()), LOST], [Delta(prompt=notes[1:]), Moved()], [token(1), END]
    )
    events = [event async for event in Resuming(those, Deadlines()).generate(ANY)]
    assert events[:2] == [Delta(prompt=notes[:1]), Delta(prompt=notes[1:])]
    assert [one.resume and one.resume.scored for one in those.asked] == [None, 1, 3]


async def test_a_request_of_which_coordinators_die_does_not_kill_them_for_ever(impatient: None) -> None:
    those = Scripted([Delta(tally=Tally()), LOST])
    with pytest.raises(Unavailable, match=f"{MAX_LOSSES} coordinators were lost"):
        [event async for event in Resuming(those, Deadlines()).generate(ANY)]
    assert len(those.asked) == MAX_LOSSES


async def test_a_coordinator_that_never_comes_back_is_waited_for_no_longer_than_configured(impatient: None) -> None:
    with pytest.raises(Unavailable, match="its coordinator was lost"):
        [event async for event in Resuming(Scripted([LOST]), Deadlines(reconnect_timeout_s=0.001)).generate(ANY)]


async def test_the_end_of_the_service_ends_its_streams(impatient: None) -> None:
    with pytest.raises(Unavailable, match="is being shut down"):
        [event async for event in Resuming(Scripted([token(1), LOST], [LOST], ends=True), Deadlines()).generate(ANY)]


async def test_a_full_coordinator_refuses_newcomers_and_not_what_was_taken_on_elsewhere(impatient: None) -> None:
    full = Rejected("overloaded", "too many", 1.0)
    assert [event async for event in Resuming(Scripted([full]), Deadlines()).generate(ANY)] == [full]
    moved = Scripted([token(1), LOST], [full], [END])
    assert [event async for event in Resuming(moved, Deadlines()).generate(ANY)][-1] == END


@pytest.mark.parametrize("role", ["target", slow("guider"), slow("guider_base")])
async def test_sessions_leave_a_model_replica_that_stops_before_it_is_gone(
    trio_engines: Mapping[Role, Engine], role: Role
) -> None:
    config = trio_config()
    async with local_service(config, trio_engines, coordinators=1) as service:
        requests = [replace(one, sampling=replace(LONG, max_tokens=100)) for one in mixed_requests(service, 3)]
        expected = await alone(service, requests)
        other = load_role(config, role)
        second = serve_role(config, role, other, service.tokenizers[role], incarnation="second", secret=service._secret)
        host, port = await second.start()
        running = asyncio.create_task(decode_all(service.coordinators[0], requests))
        await working(service.coordinators[0])
        replica = service.replicas[role]
        service.others.append(Endpoint(role, host, port, "second"))
        service.stopping.add(role)
        await until(lambda: replica.load().sessions == 0 and second.load().sessions > 0)
        await replica.stop()
        assert tokens(await running) == expected
        await second.stop()
