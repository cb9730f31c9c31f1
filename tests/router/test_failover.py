"""Failover: coordinators die, hang or hand over; model replicas are stopped. No answer changes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from llguidance import LLMatcher

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
from router import failover
from router.backend import Status, Unavailable
from router.failover import MAX_LOSSES, FailoverBackend, HandedOver
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
    """The coordinators of one service; a test can kill, hang or remove any of them during a stream."""

    def __init__(self, service: LocalService) -> None:
        self._service = service
        self.hung: set[Coordinator] = set()
        self.dead: set[Coordinator] = set()
        self.leaving: set[Coordinator] = set()
        self.short_lived: int | None = None  # if set, a stream loses its coordinator after this many messages
        self.requests: list[Generate] = []

    async def generate(self, request: Generate) -> AsyncIterator[CoordinatorEvent]:
        """Like Serve: picks a running coordinator, and raises if its process dies."""
        sent = 0
        living = [c for c in self._service.coordinators if c not in self.dead | self.leaving]
        coordinator = min(living, key=lambda c: (c in self.hung, c.load().sessions))
        self.requests.append(request)
        async with aclosing(coordinator.generate(request)) as events:
            async for event in events:
                if coordinator in self.hung:
                    await asyncio.sleep(3600)
                if coordinator in self.dead or sent == self.short_lived:
                    raise LOST
                yield event
                sent += 1

    def busy(self) -> Iterator[Coordinator]:
        """Coordinators that run and decode."""
        return (c for c in self._service.coordinators if c not in self.dead and c.load().sessions)

    async def status(self) -> Status:
        return Status()

    async def ending(self) -> bool:
        return False


@asynccontextmanager
async def fleet(
    engines: Mapping[Role, Engine], count: int = 2, **deadlines: float
) -> AsyncIterator[tuple[LocalService, Fleet, FailoverBackend]]:
    config = trio_config(deadlines=deadlines)
    async with local_service(config, engines, count) as service:
        coordinators = Fleet(service)
        yield service, coordinators, FailoverBackend(coordinators, config.deadlines)


async def answer(backend: FailoverBackend, one: Generate) -> Answer:
    """The answer to one request."""
    received = Answer()
    async for event in backend.generate(one):
        if isinstance(event, Delta):
            received.reasoning += event.reasoning
            received.content += event.content
            received.tokens += event.tokens
        else:
            received.end = event
    return received


async def both(
    backend: FailoverBackend, requests: Sequence[Generate], disturb: Any
) -> tuple[list[Answer], list[Answer]]:
    """The answers without and with `disturb()` running beside them."""
    undisturbed = [await answer(backend, one) for one in requests]
    running = [asyncio.create_task(answer(backend, one)) for one in requests]
    await disturb()
    return undisturbed, list(await asyncio.gather(*running))


def without_work_counts(usage: Usage) -> Usage:
    return replace(usage, drafted_tokens=0, accepted_tokens=0, widened_rows=0, uncovered_mass=0.0)


def assert_same(first: Sequence[Answer], second: Sequence[Answer]) -> None:
    """Asserts equal tokens, texts and counts; counts of work (drafts, rows widened again) may differ."""
    assert [(a.tokens, a.reasoning, a.content) for a in first] == [(a.tokens, a.reasoning, a.content) for a in second]
    for one, other in zip(first, second, strict=True):
        assert isinstance(one.end, Finished)
        assert isinstance(other.end, Finished)
        assert without_work_counts(one.end.usage) == without_work_counts(other.end.usage)
        assert one.end.usage.uncovered_mass == pytest.approx(other.end.usage.uncovered_mass)
        assert (one.end.reason, one.end.stop_reason) == (other.end.reason, other.end.stop_reason)


async def working(coordinator: Coordinator, tokens: int = 20) -> None:
    """Waits until the coordinator has sessions and has chosen `tokens` more tokens."""
    begun = coordinator.load().tokens
    await until(lambda: coordinator.load().sessions > 0 and coordinator.load().tokens >= begun + tokens)


def demanding_requests(service: LocalService) -> list[Generate]:
    """Requests whose next token depends on the whole history: forced ends, waits, penalties, stops, schedules."""
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
    async with fleet(trio_engines, count=4) as (service, coordinators, backend):

        async def kill() -> None:
            for _ in range(2):
                await until(lambda: any(coordinators.busy()))
                victim = next(coordinators.busy())
                await working(victim, 5)
                coordinators.dead.add(victim)

        assert_same(*await both(backend, mixed_requests(service, 8), kill))
        assert any(one.resume is not None and one.resume.choices for one in coordinators.requests)


async def test_repeated_failover_changes_no_answer(
    trio_engines: Mapping[Role, Engine],
) -> None:
    async with fleet(trio_engines) as (service, coordinators, backend):
        requests = demanding_requests(service)
        undisturbed = [await answer(backend, one) for one in requests]
        coordinators.short_lived = 3
        assert_same(undisturbed, await asyncio.gather(*(answer(backend, one) for one in requests)))
        assert len(coordinators.requests) > 4 * len(requests)


async def test_a_hanging_coordinator_is_left_within_the_peer_timeout(
    trio_engines: Mapping[Role, Engine],
) -> None:
    async with fleet(trio_engines, peer_timeout_s=1.0) as (service, coordinators, backend):

        async def hang() -> None:
            coordinator = service.coordinators[0]
            await working(coordinator)
            coordinators.hung.add(coordinator)

        assert_same(*await both(backend, mixed_requests(service, 4), hang))


async def test_a_coordinator_that_hands_over_has_and_accepts_no_session(
    trio_engines: Mapping[Role, Engine],
) -> None:
    async with fleet(trio_engines) as (service, coordinators, backend):
        leaving = service.coordinators[0]

        async def hand_over() -> None:
            await working(leaving)
            coordinators.leaving.add(leaving)
            leaving.hand_over()
            assert leaving.load().sessions == 0

        assert_same(*await both(backend, mixed_requests(service, 6), hand_over))
        assert [event async for event in leaving.generate(mixed_requests(service, 1)[0])] == [Moved()]


async def test_a_resumed_answer_without_missing_tokens_ends_at_once(
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


async def test_a_slow_stream_is_not_taken_for_a_lost_one(trio: Trio) -> None:
    free = threading.Event()
    async with fleet(trio.engines, peer_timeout_s=0.3) as (service, coordinators, backend):
        trio.disturb(lambda engine: (free.wait(10), None)[1], "target")
        running = asyncio.create_task(answer(backend, request(service.tokenizers, TEXT)))
        await asyncio.sleep(1.0)
        free.set()
        assert finished(await running).reason == "stop"
        assert len(coordinators.requests) == 1


class ScriptedCoordinators:
    """Coordinators that follow a script: each attempt yields the next list of events; an exception ends it."""

    def __init__(self, *attempts: Sequence[CoordinatorEvent | Exception], ends: bool = False) -> None:
        self._attempts, self._ends = list(attempts), ends
        self.requests: list[Generate] = []

    async def generate(self, request: Generate) -> AsyncIterator[CoordinatorEvent]:
        self.requests.append(request)
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
    """Shortens the pauses between attempts."""
    monkeypatch.setattr(failover, "_LONGEST_PAUSE_S", 0.001)


JSON = LLMatcher.grammar_from_json_schema(
    {
        "type": "object",
        "properties": {"people": {"type": "array", "items": {"type": "string", "maxLength": 9}, "minItems": 3}},
        "required": ["people"],
    }
)


def token(choice: int) -> Delta:
    return Delta(content=f" {choice}", tokens=[choice], choices=[choice], tally=Tally(guided=choice))


async def test_failover_repeats_no_token(impatient: None) -> None:
    coordinators = ScriptedCoordinators([token(1), LOST], [token(2), Moved()], [token(3)], [END])
    events = [event async for event in FailoverBackend(coordinators, Deadlines()).generate(ANY)]
    assert events == [
        Delta(content=" 1", tokens=[1]),
        Delta(content=" 2", tokens=[2]),
        Delta(content=" 3", tokens=[3]),
        END,
    ]
    assert [one.resume for one in coordinators.requests] == [
        None,
        Resume([1], Tally(guided=1)),
        Resume([1, 2], Tally(guided=2)),
        Resume([1, 2, 3], Tally(guided=3)),
    ]
    assert {one.arrived for one in coordinators.requests} == {ANY.arrived}


async def test_failover_repeats_no_prompt_log_probability(impatient: None) -> None:
    notes = [PromptNote(number, -1.0) for number in range(3)]
    coordinators = ScriptedCoordinators(
        [Delta(prompt=notes[:1], tally=Tally()), LOST], [Delta(prompt=notes[1:]), Moved()], [token(1), END]
    )
    events = [event async for event in FailoverBackend(coordinators, Deadlines()).generate(ANY)]
    assert events[:2] == [Delta(prompt=notes[:1]), Delta(prompt=notes[1:])]
    assert [one.resume and one.resume.scored for one in coordinators.requests] == [None, 1, 3]


async def test_a_request_that_crashes_coordinators_is_given_up(impatient: None) -> None:
    coordinators = ScriptedCoordinators([Delta(tally=Tally()), LOST])
    with pytest.raises(Unavailable, match=f"{MAX_LOSSES} coordinators were lost"):
        [event async for event in FailoverBackend(coordinators, Deadlines()).generate(ANY)]
    assert len(coordinators.requests) == MAX_LOSSES


WITH_GRAMMAR = replace(ANY, grammar="start: /a*/")


async def test_a_grammar_is_tried_on_no_third_coordinator_after_two_died(impatient: None) -> None:
    coordinators = ScriptedCoordinators([token(1), LOST], [Delta(tally=Tally()), LOST])
    with pytest.raises(Unavailable, match="2 coordinators were lost while they decoded with this grammar"):
        [event async for event in FailoverBackend(coordinators, Deadlines()).generate(WITH_GRAMMAR)]
    assert len(coordinators.requests) == 2


async def test_coordinators_that_stop_or_are_full_do_not_count_against_a_grammar(impatient: None) -> None:
    full = Rejected("overloaded", "the queue is full")
    begun: list[CoordinatorEvent] = [Delta(tally=Tally()), Moved()]
    alive: list[list[CoordinatorEvent | Exception]] = [[*begun], [full], [HandedOver("no coordinator runs")]]
    coordinators = ScriptedCoordinators([token(1), LOST], *alive, *alive, [END])
    events = [event async for event in FailoverBackend(coordinators, Deadlines()).generate(WITH_GRAMMAR)]
    assert events[-1] == END
    assert len(coordinators.requests) == 8


async def test_dead_coordinators_that_never_began_do_not_count_against_a_grammar(impatient: None) -> None:
    """Serve sends requests to a replica until it has noticed that its process ended."""
    coordinators = ScriptedCoordinators([token(1), LOST], [LOST], [LOST], [token(2), LOST], [LOST], [LOST], [END])
    events = [event async for event in FailoverBackend(coordinators, Deadlines()).generate(WITH_GRAMMAR)]
    assert events[-1] == END


async def test_a_grammar_that_crashes_coordinators_before_its_first_token_is_given_up(impatient: None) -> None:
    coordinators = ScriptedCoordinators([Delta(), LOST])
    with pytest.raises(Unavailable, match="2 coordinators were lost while they decoded with this grammar"):
        [event async for event in FailoverBackend(coordinators, Deadlines()).generate(WITH_GRAMMAR)]
    assert len(coordinators.requests) == 2


async def test_a_token_of_another_coordinator_clears_a_grammar(impatient: None) -> None:
    attempts: list[list[CoordinatorEvent | Exception]] = [[token(number), LOST] for number in range(5)]
    coordinators = ScriptedCoordinators(*attempts, [END])
    events = [event async for event in FailoverBackend(coordinators, Deadlines()).generate(WITH_GRAMMAR)]
    assert len(events) == 6


async def test_coordinators_that_die_in_a_grammar_change_no_answer(trio_engines: Mapping[Role, Engine]) -> None:
    async with fleet(trio_engines, count=3) as (service, coordinators, backend):

        async def kill() -> None:
            await until(lambda: any(coordinators.busy()))
            victim = next(coordinators.busy())
            await working(victim, 30)
            coordinators.dead.add(victim)

        requests = [
            replace(
                request(service.tokenizers, TEXT, sampling=replace(GREEDY, temperature=warmth), seed=seed), grammar=JSON
            )
            for seed, warmth in enumerate((0.0, 1.0, 1.0))
        ]
        undisturbed, disturbed = await both(backend, requests, kill)
        assert_same(undisturbed, disturbed)
        assert any(one.resume is not None and one.resume.choices for one in coordinators.requests)


async def test_repeated_failover_in_a_grammar_changes_no_answer(trio_engines: Mapping[Role, Engine]) -> None:
    async with fleet(trio_engines) as (service, coordinators, backend):
        requests = [replace(one, grammar=JSON) for one in demanding_requests(service)[:4]]
        undisturbed = [await answer(backend, one) for one in requests]
        coordinators.short_lived = 3
        assert_same(undisturbed, await asyncio.gather(*(answer(backend, one) for one in requests)))
        assert len(coordinators.requests) > 2 * len(requests)


async def test_waiting_for_a_coordinator_ends_at_reconnect_timeout(impatient: None) -> None:
    with pytest.raises(Unavailable, match="its coordinator was lost"):
        [
            event
            async for event in FailoverBackend(
                ScriptedCoordinators([LOST]), Deadlines(reconnect_timeout_s=0.001)
            ).generate(ANY)
        ]


async def test_shutdown_of_the_service_ends_its_streams(impatient: None) -> None:
    with pytest.raises(Unavailable, match="is being shut down"):
        [
            event
            async for event in FailoverBackend(
                ScriptedCoordinators([token(1), LOST], [LOST], ends=True), Deadlines()
            ).generate(ANY)
        ]


async def test_a_full_coordinator_rejects_new_requests_but_not_resumed_ones(impatient: None) -> None:
    full = Rejected("overloaded", "too many", 1.0)
    assert [event async for event in FailoverBackend(ScriptedCoordinators([full]), Deadlines()).generate(ANY)] == [full]
    moved = ScriptedCoordinators([token(1), LOST], [full], [END])
    assert [event async for event in FailoverBackend(moved, Deadlines()).generate(ANY)][-1] == END


@pytest.mark.parametrize("role", ["target", slow("guider"), slow("guider_base")])
async def test_sessions_leave_a_stopping_model_replica_before_it_ends(
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
