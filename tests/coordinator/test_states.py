"""The tables of allowed transitions, and the states that real decoding goes through."""

from __future__ import annotations

import ast
import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import replace
from enum import IntEnum
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from actors.api.generation import ROLES, Generate, Role
from actors.api.guidance import Guidance
from actors.coordinator import frames as frames_module
from actors.coordinator import session as session_module
from actors.coordinator.states import (
    ROW_TRANSITIONS,
    SESSION_TRANSITIONS,
    ForbiddenTransition,
    RowStage,
    SessionState,
    transition,
    transition_rows,
)
from actors.decoding import kernels
from actors.replica.build import load_role
from actors.replica.engine_thread import Engine
from tests.support.local_service import WEIGHTS, LocalService, decode, local_service, trio_config
from tests.support.trio import GREEDY, LONG, SAMPLED, TEXT, chat_prompts, decode_all, request, tokens
from tests.support.watched import Trio, until, watched

Edge = tuple[str, str]  # names: members of both enumerations are equal where their values are
MACHINES = [(SessionState, SESSION_TRANSITIONS), (RowStage, ROW_TRANSITIONS)]
QUEUED, SCORING, DECODING, PARKED, NO_REPLICA, FINISHED = (state.name for state in SessionState)
EXTENDING, LOOKING_UP, COMPLETE, WIDENING, AUDITING = (stage.name for stage in RowStage)
OWNED = {
    "state",
    "stage",
    "faults",
    "misses",
    "widened",
    "uncovered",
    "drafted",
    "accepted",
    "scored",
    "held",
    "lookups",
}


def allowed(table: bytes, before: IntEnum, after: IntEnum) -> bool:
    return bool(table[before] >> after & 1)


@pytest.mark.parametrize(("states", "table"), MACHINES)
def test_a_table_has_one_byte_for_every_state(states: type[IntEnum], table: bytes) -> None:
    assert list(states) == list(range(len(table)))
    assert len(states) <= 8
    assert all(row < 1 << len(states) for row in table)


@pytest.mark.parametrize(("states", "table"), MACHINES)
def test_forbidden_transitions_raise(states: type[IntEnum], table: bytes) -> None:
    for before, after in product(states, states):
        if allowed(table, before, after):
            assert transition(table, before, after) is after
        else:
            with pytest.raises(ForbiddenTransition, match=f"{before.name} -> {after.name}"):
                transition(table, before, after)


@pytest.mark.parametrize(("states", "table"), MACHINES)
def test_a_column_of_states_is_checked_as_single_states_are(states: type[IntEnum], table: bytes) -> None:
    pairs = list(product(states, states))
    before, after = np.array(pairs, np.uint8).T
    valid = np.frombuffer(table, np.uint8)[before] >> after & 1
    assert valid.tolist() == [allowed(table, *pair) for pair in pairs]


def test_kernels_know_the_stages_by_the_same_numbers() -> None:
    assert [kernels.EXTENDING, kernels.LOOKING_UP, kernels.COMPLETE] == [
        RowStage.EXTENDING,
        RowStage.LOOKING_UP,
        RowStage.COMPLETE,
    ]


def test_a_forbidden_transition_in_a_column_changes_no_row() -> None:
    stages = np.array([RowStage.EXTENDING, RowStage.COMPLETE, RowStage.LOOKING_UP], np.uint8)
    with pytest.raises(ForbiddenTransition, match="COMPLETE -> LOOKING_UP"):
        transition_rows(stages, np.array([0, 1]), RowStage.LOOKING_UP)
    assert stages.tolist() == [RowStage.EXTENDING, RowStage.COMPLETE, RowStage.LOOKING_UP]
    transition_rows(stages, np.array([2]), RowStage.COMPLETE)
    assert stages.tolist() == [RowStage.EXTENDING, RowStage.COMPLETE, RowStage.COMPLETE]


def test_every_state_is_reached_and_only_finished_is_final() -> None:
    for states, table in MACHINES:
        reached, frontier = {states(0)}, [states(0)]
        while frontier:
            after = [each for each in states if allowed(table, frontier[-1], each) and each not in reached]
            frontier.pop()
            frontier += after
            reached |= set(after)
        assert reached == set(states)
    assert [state for state in SessionState if not SESSION_TRANSITIONS[state]] == [SessionState.FINISHED]


def test_only_its_owner_changes_a_state_or_a_counter() -> None:
    folder = Path(session_module.__file__).parent
    changed = [
        f"{file.name}:{node.lineno}"
        for file in folder.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr in OWNED
        if not (isinstance(node.value, ast.Name) and node.value.id == "self")
    ]
    assert changed == []


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[Edge]:
    """The transitions that are applied during the test."""
    edges: set[Edge] = set()

    def applied(table: bytes, before: Any, after: Any) -> Any:
        edges.add((before.name, after.name))
        return transition(table, before, after)

    def applied_to_rows(stages: NDArray[np.uint8], at: NDArray[np.int64], after: RowStage) -> None:
        before = [RowStage(stages[row]).name for row in at.tolist()]
        transition_rows(stages, at, after)
        edges.update((name, after.name) for name in before)

    monkeypatch.setattr(session_module, "transition", applied)
    monkeypatch.setattr(frames_module, "transition", applied)
    monkeypatch.setattr(frames_module, "transition_rows", applied_to_rows)
    return edges


@pytest.fixture
def trio(trio_engines: Mapping[Role, Engine]) -> Iterator[Trio]:
    with watched(trio_engines) as trio:
        yield trio


def asked(service: LocalService, **more: Any) -> Generate:
    return request(service.tokenizers, TEXT, sampling=replace(GREEDY, max_tokens=16), **more)


async def test_a_guided_answer_looks_up_each_row_once(trio_engines: Mapping[Role, Engine], seen: set[Edge]) -> None:
    config = trio_config(exchange={"max_unseen_mass": 1, "audit_every": 0})
    async with local_service(config, trio_engines) as service:
        await decode(service.coordinators[0], asked(service))
    sessions = {(QUEUED, DECODING), (DECODING, FINISHED)}
    assert seen == sessions | {(EXTENDING, LOOKING_UP), (LOOKING_UP, COMPLETE)}


async def test_uncertain_rows_are_widened(trio_engines: Mapping[Role, Engine], seen: set[Edge]) -> None:
    async with local_service(trio_config(exchange={"k": 8, "max_unseen_mass": 0}), trio_engines) as service:
        await decode(service.coordinators[0], request(service.tokenizers, TEXT, sampling=SAMPLED))
    assert {(COMPLETE, WIDENING), (WIDENING, LOOKING_UP)} <= seen


async def test_audited_rows_wait_for_whole_rows(trio_engines: Mapping[Role, Engine], seen: set[Edge]) -> None:
    config = trio_config(exchange={"max_unseen_mass": 1, "audit_every": 1})
    async with local_service(config, trio_engines) as service:
        await decode(service.coordinators[0], asked(service))
    assert {(COMPLETE, AUDITING), (AUDITING, LOOKING_UP)} <= seen
    assert (COMPLETE, WIDENING) not in seen


async def test_lost_caches_make_rows_extend_again(
    trio: Trio, seen: set[Edge], caplog: pytest.LogCaptureFixture
) -> None:
    config = trio_config(exchange={"k": 8, "audit_every": 3})
    async with local_service(config, trio.engines) as service:
        trio.disturb(lambda engine: engine.forget_everything() if engine.forwards % 3 == 0 else None)
        tokens(await decode_all(service.coordinators[0], [asked(service, seed=seed) for seed in range(4)]))
    assert {(before, EXTENDING) for before in (EXTENDING, LOOKING_UP, COMPLETE, WIDENING, AUDITING)} & seen
    assert "a turn failed" not in caplog.text


async def test_a_scored_prompt_comes_before_the_answer(trio_engines: Mapping[Role, Engine], seen: set[Edge]) -> None:
    async with local_service(trio_config(), trio_engines) as service:
        one = replace(asked(service, chat=False), prompt_logprobs=1)
        await decode(service.coordinators[0], one)
    assert {(QUEUED, SCORING), (SCORING, DECODING), (EXTENDING, COMPLETE)} <= seen
    assert (QUEUED, DECODING) not in seen


async def test_a_session_without_room_in_a_cache_is_parked(
    trio_engines: Mapping[Role, Engine], seen: set[Edge], caplog: pytest.LogCaptureFixture
) -> None:
    models: dict[str, dict[str, Any]] = {each: {"path": str(WEIGHTS / each)} for each in ROLES}
    models["target"]["cache_tokens"] = 256
    crowded = trio_config(models=models)
    async with local_service(crowded, {**trio_engines, "target": load_role(crowded, "target")}) as service:
        requests = [
            request(service.tokenizers, text, sampling=replace(LONG, max_tokens=180), guidance=Guidance(0.0), seed=i)
            for i, text in enumerate(chat_prompts(3))
        ]
        tokens(await decode_all(service.coordinators[0], requests))
    assert {(DECODING, PARKED), (PARKED, DECODING)} <= seen
    assert "a turn failed" not in caplog.text


async def test_a_session_whose_replica_is_gone_waits_for_another(trio: Trio, seen: set[Edge]) -> None:
    async with local_service(trio_config(), trio.engines) as service:
        one = request(service.tokenizers, TEXT, sampling=replace(LONG, max_tokens=80))
        running = asyncio.create_task(decode(service.coordinators[0], one))
        await until(lambda: trio.watched["target"].forwards >= 4)
        await service.replicas["guider"].stop()
        await until(lambda: (DECODING, NO_REPLICA) in seen)
        trio.watched["guider"].clear()
        await service.start_replica("guider")
        tokens([await running])
    assert (NO_REPLICA, DECODING) in seen
