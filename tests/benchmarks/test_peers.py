from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.api.generation import ROLES
from actors.preflight import load_tokenizers
from benchmarks import peers
from benchmarks.baselines import Decoded, Task
from benchmarks.peers import Comparison, Measured, Plan, Way, in_turn, over_http, round_of, table, tasks, warm, ways
from benchmarks.shapes import SHAPES
from benchmarks.workers import service
from router.api import create_app
from tests.support.local_backend import LocalBackend
from tests.support.local_service import WEIGHTS
from tests.support.scripted_service import serving
from tests.support.workers import launch_here

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft triggers it

PLAN = Plan(replace(SHAPES["trio"], adapter=WEIGHTS / "guider_dpo"), (3,), tokens=8, rounds=2)


@pytest.fixture
async def compared(tmp_path: Path) -> AsyncIterator[tuple[dict[str, Way], Comparison]]:
    """Every way of the plan with the embedded trio in this process, and the tasks of two rounds."""
    config = PLAN.config(tmp_path)
    tokenizers = load_tokenizers(config)
    comparison = Comparison("trio", [tasks(tokenizers, 3, PLAN.tokens, number) for number in range(PLAN.rounds)])
    async with service(PLAN.shape, config, 0.0, 1, launch_here) as running:
        yield await ways(PLAN, running, launch_here), comparison


async def test_service_and_peers_decode_the_same_answers(compared: tuple[dict[str, Way], Comparison]) -> None:
    found, comparison = compared
    asked = comparison.tasks[0]
    answers = {name: (await way(asked)).decoded.answers for name, way in found.items()}
    assert answers["target"] == answers["generate"]
    assert answers["guided"] == answers["guided_plain"] == answers["static"]
    assert answers["guided"] != answers["target"]
    assert answers["loop"] == [answers["guided"][1], answers["guided"][2]]  # the warm-up has none here
    assert {len(answer) for all_ in answers.values() for answer in all_} == {PLAN.tokens}


async def test_a_result_has_rates_times_memory_and_ratios(compared: tuple[dict[str, Way], Comparison]) -> None:
    found, comparison = compared
    await warm(found, comparison)
    assert not comparison.runs
    for number in range(PLAN.rounds):
        await round_of(found, comparison, number)
    result = comparison.result()
    for way in ("target", "guided", "guided_plain", "generate", "loop", "static"):
        assert result[way]["tokens_per_s"] > 0
        assert 0 < result[way]["first_token_s"] < PLAN.tokens / result[way]["tokens_per_s"] * 3
        assert 50 < result[way]["memory_mb"] < 20_000
        assert len(comparison.details()["tokens_per_s"][way]) == PLAN.rounds
    assert (result["target_equal_generate"], result["guided_equal_static"]) == (1.0, 1.0)
    assert {"target_over_generate", "guided_over_loop", "guided_over_static"} <= result.keys()
    other = Comparison("other", comparison.tasks, {name: comparison.runs[name] for name in ("target", "generate")})
    assert "guided_over_loop" not in other.result()
    assert table("sft", [comparison, other]).row_count == 6 * 3 + 4 + 2


async def test_answers_over_http_are_those_of_the_coordinator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SETTLE_S", 0.0)
    config = PLAN.config(tmp_path)
    tokenizers = load_tokenizers(config)
    asked = tasks(tokenizers, 3, PLAN.tokens, 0)
    async with service(PLAN.shape, config, 0.0, 1, launch_here) as running:
        backend: Any = LocalBackend(SimpleNamespace(coordinators=[running.coordinator]))  # type: ignore[arg-type]
        async with serving(create_app(config, tokenizers, backend)) as url:
            with ThreadPoolExecutor(1) as client:
                target = over_http(url, {"model": f"{config.name}/target"}, [os.getpid()], client)
                measured = await target(asked)
        expected = await running.run("target", asked, 0.0)
    assert measured.decoded.answers == expected.decoded.answers
    assert 0 < max(measured.decoded.first_s) < measured.decoded.seconds
    assert measured.memory > 50_000_000


@pytest.mark.usefixtures("stand_ins")
def test_over_http_every_role_is_on_vllm_with_the_peers_threads() -> None:
    config = Plan(SHAPES["trio"], (2, 5), threads=4).http_config()
    threads = [config.models.role(role).runtime_env["env_vars"]["OMP_NUM_THREADS"] for role in ROLES]
    assert threads == ["4", "2", "2"]
    assert {config.models.role(role).engine for role in ROLES} == {"vllm"}
    assert config.coordinator.max_sessions == 5


@pytest.mark.usefixtures("stand_ins")
def test_without_vllm_its_part_is_skipped_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "VLLM_PYTHON", tmp_path / "python")
    assert peers.main(["--parts", "http"]) == 0
    shown = capsys.readouterr()
    assert "make venv-vllm" in shown.err
    assert shown.out == "[]\n"


@pytest.mark.usefixtures("stand_ins")
def test_a_server_that_does_not_start_costs_no_other_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(plan: Plan) -> list[Comparison]:
        raise RuntimeError("no port")

    monkeypatch.setattr(peers, "VLLM_PYTHON", Path(sys.executable))
    monkeypatch.setattr(peers, "run", lambda plans: [])
    monkeypatch.setattr(peers, "run_http", fails)
    assert peers.main([]) == 1
    shown = capsys.readouterr()
    assert "failed: http: no port" in shown.err
    assert shown.out == "[]\n"


def test_a_ratio_is_that_of_the_medians() -> None:
    comparison = Comparison("tiny", [[Task({}, 1)]])
    for seconds in (1.0, 2.0, 9.0):
        comparison.took("target", Measured(Decoded([[1]], seconds, [seconds]), 1_000_000))
        comparison.took("generate", Measured(Decoded([[1] * 4], seconds**2, [0.5]), 3_000_000))
    result = comparison.result()
    assert result["target_over_generate"] == 0.5
    assert result["target"] == {"tokens_per_s": 0.5, "first_token_s": 2.0, "memory_mb": 1}
    assert (result["generate"]["memory_mb"], result["target_equal_generate"]) == (3, 0.0)


async def test_the_loop_decodes_other_tasks_in_each_round() -> None:
    seen: list[Sequence[Task]] = []

    async def way(asked: Sequence[Task]) -> Measured:
        seen.append(asked)
        return Measured(Decoded([], 1.0), 0)

    run, asked = in_turn(way), [Task({}, tokens) for tokens in range(3)]
    for _ in range(3):
        await run(asked)
    await run(asked[:1])
    assert [[task.tokens for task in each] for each in seen] == [[1, 2], [2, 0], [0, 1], [0]]
