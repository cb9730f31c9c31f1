"""Whole evaluations of the embedded trio through replicas, sockets and a coordinator in this process."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from actors.api.generation import Role
from actors.config import ConfigError
from actors.replica.engine_thread import Engine
from benchmarks.effect import MODES, measure
from cluster.demo.task import questions
from cluster.demo.tokenizer import MARKUP
from cluster.jobs import choose_alpha, evaluate
from cluster.jobs.client import Client
from cluster.jobs.config import checked
from cluster.jobs.connecting import Connection
from cluster.jobs.evaluation_report import write_report
from cluster.jobs.replay import divergences, replay, requests
from cluster.jobs.results import OtherRun, Results
from cluster.jobs.sample import ALONE, Key
from cluster.jobs.summary import Variant, summarise
from cluster.jobs.workload import Workload, load_workload
from tests.support.local_backend import Interruption, LocalBackend
from tests.support.local_ray import READY_S, ROOT, wait_until
from tests.support.local_service import LocalService, local_service, trio_config

HOPS = (2, 3)
PER_HOP = 6
ALPHAS = (0.0, 0.5, 1.0, 1.5)
CONSOLE = Console(quiet=True)


def task_files(folder: Path, temperature: float = 0) -> list[str]:
    """A task for each hop count, with the benchmark's limit of tokens."""
    paths = []
    for hops in HOPS:
        task = {
            "name": f"hops{hops}",
            "data": {"demo": {"hops": [hops], "split": "held_out", "n": PER_HOP}},
            "grader": "multihop",
            "temperature": temperature,
            "top_p": 1,
            "max_tokens": MARKUP.budget(hops),
        }
        path = folder / f"hops{hops}.yaml"
        path.write_text(yaml.safe_dump(task), encoding="utf-8")
        paths.append(str(path))
    return paths


def workload(folder: Path, **keys: Any) -> Workload:
    given = {"run": str(folder), "tasks": task_files(folder.parent), "alpha": ALPHAS, "seeds": [0, 1]}
    return load_workload(checked(given | keys))


@asynccontextmanager
async def connection(
    engines: Mapping[Role, Engine], stop_after: int | None = None
) -> AsyncIterator[tuple[Any, LocalBackend, LocalService]]:
    async with local_service(trio_config(), engines) as service:
        backend = LocalBackend(service, stop_after)
        yield Connection(backend, service.config), backend, service


async def run(work: Workload, engines: Mapping[Role, Engine], stop_after: int | None = None, **keys: Any) -> int:
    """Run one evaluation to its end. Returns the number of its requests."""
    async with connection(engines, stop_after) as (connected, backend, _):
        await evaluate.evaluate(work, connected, work.evaluation.run, CONSOLE, **keys)
    return backend.requests


async def test_the_job_has_the_benchmarks_accuracy_in_every_arm_and_seed(
    trio_engines: Mapping[Role, Engine], tmp_path: Path
) -> None:
    work = workload(tmp_path / "run")
    async with connection(trio_engines) as (connected, _, service):
        await evaluate.evaluate(work, connected, tmp_path / "run", CONSOLE)
        effects = {alpha: await measure(service, HOPS, PER_HOP, alpha, lambda: None) for alpha in ALPHAS}
    samples = list(Results(tmp_path / "run").samples())
    assert len(samples) == (len(MODES) - 1 + len(ALPHAS)) * len(HOPS) * PER_HOP * 2
    for alpha, effect in effects.items():
        for hops in HOPS:
            for mode in MODES:
                setting = f"a{alpha:g}" if mode == "guided" else ALONE
                for seed in (0, 1):
                    place = (f"hops{hops}", mode, setting, seed)
                    found = [s.right for s in samples if (s.key.task, s.key.mode, s.key.setting, s.key.seed) == place]
                    assert len(found) == PER_HOP
                    assert round(sum(found) / PER_HOP, 4) == effect.by_hops[hops][mode], place
    overall = summarise(Results(tmp_path / "run"))
    guided, target = overall.score(Variant("guided", "a1")), overall.score(Variant("target"))
    assert guided is not None
    assert target is not None
    assert guided.pass_at_1.value > target.pass_at_1.value
    figures = write_report(tmp_path / "run")
    assert figures["samples"] == figures["expected"] == len(samples)
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


async def test_an_interrupted_run_resumes_to_the_same_bytes(
    trio_engines: Mapping[Role, Engine], tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"alpha": [1.0], "seeds": [0], "concurrency": 5}
    whole, parts = workload(tmp_path / "whole", **keys), workload(tmp_path / "parts", **keys)
    total = await run(whole, trio_engines)
    asked = 0
    for stop_after in (7, 1, 20):
        with pytest.raises(ExceptionGroup) as caught:
            await run(parts, trio_engines, stop_after)
        assert caught.group_contains(Interruption)
        kept = Results(tmp_path / "parts").done()
        assert asked <= len(kept) <= asked + stop_after
        asked = len(kept)
    assert await run(parts, trio_engines) == total - asked
    assert await run(parts, trio_engines) == 0
    first, second = (tmp_path / folder / "samples.jsonl" for folder in ("whole", "parts"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_a_job_killed_five_times_ends_with_undisturbed_bytes(tmp_path: Path) -> None:
    chance = random.Random(5)
    for folder, kills in (("whole", 0), ("killed", 5)):
        given = {"run": str(tmp_path / folder), "tasks": task_files(tmp_path), "alpha": [1.0], "concurrency": 6}
        config = tmp_path / f"{folder}.yaml"
        config.write_text(yaml.safe_dump(given), encoding="utf-8")
        kept = 0
        for _ in range(kills):
            kept = killed(config, tmp_path / folder, kept + chance.randint(1, 8), chance.uniform(0, 0.05))
        assert 0 < kept < 4 * len(HOPS) * PER_HOP or not kills
        subprocess.run(command(config), cwd=ROOT, capture_output=True, timeout=READY_S, check=True)
    whole, broken = (tmp_path / folder / "samples.jsonl" for folder in ("whole", "killed"))
    assert whole.read_bytes() == broken.read_bytes()
    assert len(whole.read_bytes().splitlines()) == 4 * len(HOPS) * PER_HOP


def command(config: Path) -> list[str]:
    return [sys.executable, "-m", "tests.support.evaluating", str(config)]


def killed(config: Path, folder: Path, enough: int, later_s: float) -> int:
    """Run until `enough` samples exist, wait `later_s` seconds, then send SIGKILL. Returns the number of samples."""
    with subprocess.Popen(command(config), cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: process.poll() is not None or len(Results(folder).done()) >= enough, "the next samples")
        time.sleep(later_s)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    return len(Results(folder).done())


async def test_another_configuration_needs_a_fresh_start_of_the_folder(
    trio_engines: Mapping[Role, Engine], tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"modes": ["guided"], "seeds": [0]}
    await run(workload(tmp_path / "run", alpha=[1.0], **keys), trio_engines)
    other = workload(tmp_path / "run", alpha=[0.5], **keys)
    with pytest.raises(OtherRun, match=r"evaluation\.alpha"):
        await run(other, trio_engines)
    write_report(tmp_path / "run")
    await run(other, trio_engines, resume=False)
    left = {path.suffix for path in (tmp_path / "run").iterdir()}
    assert not left & {".html", ".md"}, "reports of deleted samples"
    assert {sample.key.setting for sample in Results(tmp_path / "run").samples()} == {"a0.5"}


async def test_concurrency_and_placement_may_change_between_two_starts(
    trio_engines: Mapping[Role, Engine], tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"modes": ["target"], "seeds": [0]}
    await run(workload(tmp_path / "run", concurrency=2, **keys), trio_engines)
    assert await run(workload(tmp_path / "run", concurrency=3, **keys), trio_engines) == 0


async def test_a_problem_that_does_not_fit_is_refused_before_any_request(
    trio_engines: Mapping[Role, Engine], tmp_path: Path
) -> None:
    choices = [{"task": task, "max_tokens": 10_000_000} for task in task_files(tmp_path)]
    with pytest.raises(ConfigError, match=r"hops2, problem 2-0000, target: .*ask for at most"):
        await run(workload(tmp_path / "run", tasks=choices), trio_engines)
    assert not (tmp_path / "run").exists()


async def test_sampled_answers_of_one_problem_differ_and_repeat_with_the_run(
    trio_engines: Mapping[Role, Engine], tmp_path: Path
) -> None:
    path = task_files(tmp_path, temperature=1.0)[0]
    keys: dict[str, Any] = {"tasks": [{"task": path, "samples": 4}], "alpha": [1.0], "modes": ["target", "guided"]}

    async def texts(folder: str) -> dict[Key, str]:
        made = load_workload(checked({"run": str(tmp_path / folder), "seeds": [0, 1]} | keys))
        await run(made, trio_engines)
        return {sample.key: sample.text for sample in Results(tmp_path / folder).samples()}

    once, twice = await texts("once"), await texts("twice")
    assert once == twice
    problem = [text for key, text in once.items() if key.problem == "2-0000" and key.mode == "target"]
    assert len(problem) == 8
    assert len(set(problem)) > 1


def own_data(folder: Path, rows: int) -> Path:
    """Multi-hop questions as a user's own data file."""
    path = folder / "mine.jsonl"
    asked = [question for hops in HOPS for question in questions("held_out", hops, rows)]
    lines = [json.dumps({"q": question.text, "gold": question.direct_answer}) for question in asked]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def alpha_options(folder: Path, rows: int, *more: str) -> Any:
    data = own_data(folder, rows)
    given = ["--data", str(data), "--question", "q", "--answer", "gold", "--run", str(folder / "run")]
    return choose_alpha._options([*given, "--temperature", "0", "--max-tokens", "48", *more])


async def test_the_alpha_that_helps_is_chosen_for_a_users_own_data(
    trio_engines: Mapping[Role, Engine], tmp_path: Path
) -> None:
    evaluation = choose_alpha.sweep(alpha_options(tmp_path, 12, "--alpha", "0.5", "1", "8"))
    await run(load_workload(evaluation), trio_engines)
    choice = choose_alpha.report_choice(Results(tmp_path / "run"), evaluation, CONSOLE)
    assert choice["helps"]
    assert choice["alpha"] in (0.5, 1.0)
    assert choice["words"].startswith(f"Choose alpha {choice['alpha']:g}")
    assert 0 < choice["difference"][1] <= choice["difference"][0] <= choice["difference"][2]


async def test_guidance_that_does_not_help_is_not_chosen(trio_engines: Mapping[Role, Engine], tmp_path: Path) -> None:
    evaluation = choose_alpha.sweep(alpha_options(tmp_path, 6, "--alpha", "8"))
    await run(load_workload(evaluation), trio_engines)
    choice = choose_alpha.report_choice(Results(tmp_path / "run"), evaluation, CONSOLE)
    assert not choice["helps"]
    assert choice["alpha"] == 0
    assert choice["words"].startswith("Guidance does not help here")


async def test_without_right_answers_no_alpha_is_chosen(trio_engines: Mapping[Role, Engine], tmp_path: Path) -> None:
    options = alpha_options(tmp_path, 2, "--alpha", "0", "1")
    rows = [json.loads(line) | {"gold": "Nobody"} for line in options.data.read_text(encoding="utf-8").splitlines()]
    options.data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    evaluation = choose_alpha.sweep(options)
    await run(load_workload(evaluation), trio_engines)
    choice = choose_alpha.report_choice(Results(tmp_path / "run"), evaluation, CONSOLE)
    assert choice["words"].startswith("No answer is right in any setting")
    assert "the right answer is 'Nobody'" in choice["words"]
    summary = summarise(Results(tmp_path / "run"))
    assert [str(score.variant) for score in summary.steered] == ["guided a1"], "alpha 0 guides nothing"
    untried = summary.score(Variant("guided", "a0"))
    assert untried is not None
    assert untried.p is None


async def test_a_replayed_request_shows_where_the_modes_diverge(trio_engines: Mapping[Role, Engine]) -> None:
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "Who is the mentor of the rival of Ada?"}],
        "temperature": 0,
        "max_tokens": 48,
        "guidance": {"alpha": 1.0},
        "stream": True,
    }
    async with connection(trio_engines) as (_, backend, service):
        asked = requests(body, service.config, service.tokenizers)
        replayed = await replay(Client(backend, service.config, service.tokenizers), asked, service.tokenizers)
    assert [each.mode for each in replayed] == list(MODES)
    texts = {each.mode: each.pieces for each in replayed}
    for divergence in divergences(replayed):
        if divergence.after is None:
            assert texts[divergence.mode] == texts["target"]
            continue
        assert texts[divergence.mode][: divergence.after] == texts["target"][: divergence.after]
        assert texts[divergence.mode][divergence.after :][:1] != texts["target"][divergence.after :][:1]
        assert divergence.target != divergence.other
    assert any(divergence.mode == "guided" and divergence.after is not None for divergence in divergences(replayed))


def test_a_relative_folder_of_a_submitted_job_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / evaluate.COPIED / "_ray_pkg_0"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(ConfigError, match="deletes when the job ends"):
        evaluate.run(checked({"run": "runs/x", "tasks": ["multihop"]}), CONSOLE)


async def test_a_signal_ends_the_work_with_its_exit_status(tmp_path: Path) -> None:
    async def work() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(60)

    with pytest.raises(evaluate.Stopped) as stopped:
        await evaluate.until_stopped(work())
    assert stopped.value.status == 143
