from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from benchmarks.baselines import Baselines, Decoded, Task
from benchmarks.decode import Bench, Plan, Rounds
from benchmarks.processes import ProcessWorker, thread_environment
from benchmarks.shapes import SHAPES, spread
from benchmarks.tasks import first, tasks
from benchmarks.workers import Mode, Service, service
from tests.support.workers import LocalWorker, launch_here

PLAN = Plan(SHAPES["tiny"], (3,), context=6, tokens=8)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Service]:
    async with service(PLAN.shape, PLAN.config(tmp_path), PLAN.agreement, 1, launch_here) as running:
        yield running


@pytest.fixture
def mixed(tmp_path: Path) -> list[Task]:
    folder = tmp_path / "vocabulary"
    folder.mkdir()
    return tasks(PLAN.shape, PLAN.config(folder), 3, PLAN.context, PLAN.tokens)


async def test_service_and_baselines_decode_the_same_tokens(served: Service, mixed: list[Task]) -> None:
    baselines = Baselines(PLAN.shape, PLAN.agreement, 1)
    modes: tuple[Mode, ...] = ("guided", "guided_plain", "target", "target_drafted")
    guided, plain, alone, drafted = [(await served.run(mode, mixed, 0.0)).decoded.answers for mode in modes]
    assert [len(answer) for answer in guided] == [task.tokens for task in mixed]
    assert guided == plain == baselines.loop(mixed, 0.0).answers == baselines.static(mixed, 0.0).answers
    assert alone == drafted == baselines.target(mixed, 0.0).answers
    assert len({token for answer in guided for token in answer}) == sum(task.tokens for task in mixed)


async def test_a_result_has_every_figure_the_benchmark_promises(served: Service, mixed: list[Task]) -> None:
    bench, rounds = Bench(PLAN), Rounds(3, [mixed] * 2, PLAN.agreement)
    bench.add_service(served)
    bench.add_baselines(LocalWorker(Baselines(PLAN.shape, PLAN.agreement, 1)))
    await bench.warm(rounds)
    assert not rounds.rates
    assert not rounds.phases
    for number in range(2):
        await bench.round(rounds, number)
    result = rounds.result()
    rates = ("guided", "guided_plain", "target", "target_drafted", "loop", "static", "target_plain")
    assert {f"{name}_tps" for name in rates} <= result.keys()
    for name in ("target", "loop", "static", "plain", "target_drafted"):
        assert result[f"guided_over_{name}"] > 0
    assert {"sessions", "acceptance"} <= result.keys()
    assert all(len(all_) == 2 for all_ in rounds.rates.values())
    assert 0 < rounds.phases["guided"][0].target <= 1
    assert rounds.phases["target"][0].guider == 0


def test_without_speculation_the_plain_rate_is_the_guided_one() -> None:
    rounds = Rounds(1, [], 0.8)
    for name, seconds in (("guided_plain", 2.0), ("target", 1.0)):
        rounds.took(name, Decoded([[1, 2]], seconds))
    result = rounds.result()
    assert (result["guided_tps"], result["guided_over_target"], result["acceptance"]) == (1.0, 0.5, None)
    assert "guided_plain_tps" not in result


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    rounds = Rounds(1, [], 0.8)
    for guided, target in ((1.0, 2.0), (10.0, 20.0), (30.0, 10.0)):
        rounds.took("guided", Decoded([[1]], 1 / guided))
        rounds.took("target", Decoded([[1]], 1 / target))
    assert rounds.result()["guided_over_target"] == 0.5


def test_lengths_are_mixed_around_their_mean() -> None:
    assert spread(48, 1) == [48]
    lengths = spread(48, 32)
    assert (min(lengths), max(lengths)) == (24, 72)
    assert sum(lengths) == pytest.approx(48 * 32, rel=0.01)


def test_the_trios_prompts_are_in_each_roles_own_tokens(tmp_path: Path) -> None:
    plan = Plan(SHAPES["trio"], (4,))
    made = tasks(plan.shape, plan.config(tmp_path), 4, 0, 0)
    assert [task.tokens for task in made] == sorted(task.tokens for task in made)
    assert all(task.prompts["guider"] for task in made)
    assert [task.tokens for task in first(made, 5)] == [5] * 4


async def test_a_process_returns_results_and_raises_its_exceptions() -> None:
    worker = ProcessWorker(dict, (), thread_environment(1))
    try:
        await worker.answer()
        assert await worker.call("setdefault", "a", 1) == 1
        with pytest.raises(KeyError):
            await worker.call("pop", "b")
    finally:
        await worker.close()
