"""Simulated models: their times, their agreement, and the benchmark that decodes with them."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actors.api.generation import ROLES, Role
from actors.config import ServiceConfig
from actors.decoding.hashing import derive_seed, extend_hashes
from actors.engine.interface import Extend, KVMiss
from actors.metrics import METRICS, Counter, Metric, Recorder
from benchmarks.decode import Bench, Rounds
from benchmarks.shapes import service_config
from benchmarks.timed import MODES, TimedPlan, placed, result, table
from benchmarks.timed_engine import (
    SIMULATION,
    TIMED_SHAPES,
    AgreeingBank,
    ForwardTimes,
    TimedEngine,
    TimedShape,
    Timer,
    agrees,
)
from benchmarks.workers import HIDDEN_DRAFTS, Service, hidden_drafts, service
from tests.support.workers import launch_here

TIMES = ForwardTimes(step_ms=2.0, check_ms=2.1, token_ms=0.01)
SMALL = ForwardTimes(step_ms=0.2, check_ms=0.2, token_ms=0.001)
TINY = TimedShape(
    "tiny",
    {"vocab_size": 1_009},
    {"vocab_size": 1_001},
    times={"target": TIMES, "guider": SMALL, "guider_base": SMALL},
)
PLAN = TimedPlan(TINY, (2,), context=6, tokens=32)


class FakeClock:
    """A clock that only sleeping moves, `late_s` too far each time."""

    def __init__(self, late_s: float = 0.0) -> None:
        self.now, self.late_s = 100.0, late_s

    def read(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds + self.late_s


def timed_engine(clock: FakeClock, role: Role = "target") -> TimedEngine:
    return TimedEngine(TINY, role, 0.8, timer=Timer(clock.read, clock.sleep))


def extends(engine: TimedEngine, lengths: Sequence[int], *, position: int = 0) -> list[Extend]:
    """One extend of so many tokens for each session."""
    return [
        Extend(session, position, engine.hash_seed, [session + 1] * length, 1, 0)
        for session, length in enumerate(lengths)
    ]


@pytest.mark.parametrize(
    ("shape", "step_ms", "check_ms", "small_ms"), [("h200-32b", 14, 14.5, 2), ("h200-7b", 4, 4.3, 1.5)]
)
def test_a_few_tokens_take_the_time_of_reading_all_weights(
    shape: str, step_ms: float, check_ms: float, small_ms: float
) -> None:
    times = TIMED_SHAPES[shape].times
    for sessions in (1, 32):
        assert times["target"].ms([1] * sessions) == step_ms
        assert times["target"].ms([1] * (sessions - 1) + [8]) == check_ms
        assert times["guider"].ms([1] * sessions) == times["guider_base"].ms([8] * sessions) == small_ms


@pytest.mark.parametrize("shape", TIMED_SHAPES.values(), ids=TIMED_SHAPES)
def test_many_tokens_take_time_in_proportion_however_they_are_shared(shape: TimedShape) -> None:
    for times in shape.times.values():
        assert times.ms([4_096]) == times.ms([8] * 512) == pytest.approx(2 * times.ms([2_048]))
        assert times.ms([]) == 0


@pytest.mark.parametrize("lengths", [[1], [1] * 3, [8, 1], [500]])
@pytest.mark.parametrize("late_s", [0.0, 7e-5])
def test_a_forward_sleeps_as_long_as_the_table_says(lengths: list[int], late_s: float) -> None:
    engine = timed_engine(clock := FakeClock(late_s))
    began = clock.now
    engine.extend(extends(engine, lengths))
    assert 1_000 * (clock.now - began) == pytest.approx(TIMES.ms(lengths))


def test_an_extend_that_is_refused_takes_no_time() -> None:
    engine = timed_engine(clock := FakeClock())
    began = clock.now
    assert engine.extend(extends(engine, [3], position=5)) == [KVMiss(0, 0)]
    assert clock.now == began


def test_small_models_share_one_device_if_they_are_placed_so() -> None:
    assert placed(TINY, "apart").device_locks == {}
    locks = placed(TINY, "shared").device_locks
    assert locks.keys() == {"guider", "guider_base"}
    assert locks["guider"] is locks["guider_base"]


@pytest.mark.parametrize("role", ROLES)
def test_a_shared_device_is_held_while_a_forward_sleeps(role: Role) -> None:
    busy: list[bool] = []
    device, clock = threading.Lock(), FakeClock()
    timer = Timer(clock.read, lambda seconds: busy.append(device.locked()))
    engine = TimedEngine(replace(TINY, device_locks={"guider": device}), role, 0.8, timer=timer)
    busy.clear()  # of the timer's own sleeps
    engine.extend(extends(engine, [1]))
    assert busy == [role == "guider"]
    assert not device.locked()


@pytest.mark.parametrize("agreement", [0.0, 0.3, 0.8, 1.0])
def test_the_share_of_agreeing_hashes_is_the_agreement(agreement: float) -> None:
    hashes = extend_hashes(derive_seed(1), range(20_000))
    share = np.mean([agrees(each, agreement) for each in hashes])
    deviation = (agreement * (1 - agreement) / len(hashes)) ** 0.5
    assert share == pytest.approx(agreement, abs=4 * deviation)


def test_an_agreement_is_a_probability() -> None:
    with pytest.raises(ValueError, match="a probability was expected"):
        AgreeingBank(TINY, "guider", 1.2)


@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_guider_and_guided_choice_are_equal_where_the_hash_agrees(temperature: float) -> None:
    sessions, rows = range(400), {}
    for role in ROLES:
        engine = timed_engine(FakeClock(), role)
        engine.extend(extends(engine, [2] * len(sessions)))
        rows[role] = engine.whole(sessions)[:, : TINY.common]
    noise = np.random.default_rng(0).gumbel(size=rows["target"].shape) * temperature
    guided = (rows["target"] + rows["guider"] - rows["guider_base"] + noise).argmax(1)
    hashes = [extend_hashes(engine.hash_seed, [session + 1] * 2)[-1] for session in sessions]
    agreeing = [agrees(each, 0.8) for each in hashes]
    assert ((rows["guider"] + noise).argmax(1) == guided).tolist() == agreeing
    assert ((rows["target"] + noise).argmax(1) == guided).all()
    assert 0 < sum(agreeing) < len(sessions)


@pytest.fixture
def config(tmp_path: Path) -> ServiceConfig:
    return service_config(TINY, tmp_path, cache_tokens=4_096, sessions=2, speculate=True, adapt=False)


@pytest.fixture
async def served(config: ServiceConfig) -> AsyncIterator[Service]:
    async with service(PLAN.shape, config, PLAN.agreement, 1, launch_here) as running:
        yield running


@pytest.fixture
def rounds(config: ServiceConfig) -> Rounds:
    return Rounds(2, [PLAN.tasks(config, 2, number) for number in range(2)], PLAN.agreement)


async def test_the_three_ways_decode_the_same_tokens(served: Service, rounds: Rounds) -> None:
    guided, plain, alone = [await served.run(mode, rounds.tasks[0], PLAN.temperature) for mode in MODES]
    assert guided.decoded.answers == plain.decoded.answers == alone.decoded.answers
    assert 0 < guided.accepted < guided.drafted
    assert (plain.drafted, alone.drafted) == (0, 0)
    assert 0 <= guided.hidden <= guided.drafted
    series = {metric.name: series for metric, _, series in served.coordinator.measured()}
    widened = series["thinklogit_widened_rows"]
    assert isinstance(widened, Counter)
    assert widened.value == 0


async def test_a_result_has_its_figures_and_is_marked_as_a_simulation(served: Service, rounds: Rounds) -> None:
    bench = Bench(PLAN)
    bench.add_service(served)
    for number in range(2):
        await bench.round(rounds, number)
    shown = result(PLAN, "apart", rounds)
    assert list(shown)[:6] == [
        "shape",
        "sessions",
        "guided_over_target",
        "guided_plain_over_target",
        "hidden_drafts_share",
        "simulation",
    ]
    assert shown["simulation"] is True
    assert min(shown[f"{mode}_tps"] for mode in MODES) > 0
    assert shown["target_forward_ms"] > 0.9 * TIMES.step_ms
    assert SIMULATION in str(table([shown]).title)


def test_hidden_drafts_are_read_where_a_coordinator_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    recorder.counter("thinklogit_drafted_tokens").add(8)
    assert hidden_drafts(recorder) == 0
    monkeypatch.setitem(METRICS, HIDDEN_DRAFTS, Metric(HIDDEN_DRAFTS, "counter", "Drafts made during verification"))
    recorder.counter(HIDDEN_DRAFTS).add(3)
    assert hidden_drafts(recorder) == 3
