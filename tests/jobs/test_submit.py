"""`ray job submit` to a cluster on this machine, with the command of the README."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray import serve
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.job_submission import JobStatus, JobSubmissionClient

from benchmarks.effect import ADAPTER, MODES
from cluster.jobs.results import Results
from tests.support.local_ray import APPLICATION, READY_S, ROOT, SharedRay, shared_args, trio_args, wait_until

pytestmark = pytest.mark.ray

PROBLEMS = 16
FEW = 8
OWN = "evaluated"  # a service that does not run in the cluster, so that the job starts it


@pytest.fixture(scope="module")
def dashboard(shared_ray: SharedRay) -> str:
    """The address of the dashboard of the shared cluster."""
    return shared_ray.dashboard


def config(tmp_path: Path, concurrency: int | None, **changed: Any) -> Path:
    """An evaluation of all modes by a batch-invariant service that the job has to start."""
    args = trio_args() | {"batch_invariant": True, "name": OWN}
    return written(tmp_path, args, {"alpha": [0.5, 1.0], "concurrency": concurrency} | changed)


def written(tmp_path: Path, args: dict[str, Any], given: dict[str, Any]) -> Path:
    """The file of an evaluation of PROBLEMS problems, beside its service's file."""
    application = {"name": args["name"], "import_path": "router.app:build", "args": args}
    service = tmp_path / "service.yaml"
    service.write_text(yaml.safe_dump({"applications": [application]}), encoding="utf-8")
    path = tmp_path / "config.yaml"
    whole: dict[str, Any] = {
        "run": "runs/never",  # what a submitted job must not use
        "service": str(service),
        "tasks": [{"task": "multihop", "limit": PROBLEMS}],
    }
    path.write_text(yaml.safe_dump(whole | given), encoding="utf-8")
    return path


def submit(dashboard: str, config: Path, run: Path) -> str:
    """The id of a job submitted by Ray's own command line."""
    entry = [sys.executable, "-m", "cluster.jobs.evaluate", str(config), "--run", str(run)]
    command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--no-wait", "--address", dashboard]
    deadline = time.monotonic() + READY_S
    while True:
        done = subprocess.run(
            [*command, "--working-dir", str(ROOT), "--", *entry],
            capture_output=True,
            text=True,
            timeout=READY_S,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        if (found := re.search(r"Job '(\w+)' submitted successfully", done.stdout)) is not None:
            return found.group(1)
        # The dashboard answers before the agent that runs jobs does.
        assert "No available agent" in done.stderr, done.stdout + done.stderr
        assert time.monotonic() < deadline, done.stderr
        time.sleep(1.0)


def own_is_gone(dashboard: str) -> bool:
    """True if no application of a job is left. Asks the dashboard: `serve.status` keeps a controller that has ended."""
    details = ServeSubmissionClient(dashboard).get_serve_details()  # sends the cluster's token
    return not any(name.startswith(OWN) for name in details["applications"])


def result_of(logs: str) -> dict[str, Any]:
    """The JSON object in the last such line of a job's log."""
    result: dict[str, Any] = json.loads(next(line for line in reversed(logs.splitlines()) if line.startswith("{")))
    return result


def test_submitted_job_uses_the_service_that_runs(shared_ray: SharedRay, tmp_path: Path) -> None:
    assert shared_ray.url
    client, folder = JobSubmissionClient(shared_ray.dashboard), tmp_path / "run"
    path = written(tmp_path, shared_args(), {"alpha": [1.0], "modes": ["target", "guided"]})
    job = submit(shared_ray.dashboard, path, folder)
    wait_until(lambda: client.get_job_status(job).is_terminal(), "the end of the job")
    logs = client.get_job_logs(job)
    assert client.get_job_status(job) == JobStatus.SUCCEEDED, logs
    assert f"using the service {APPLICATION} that runs in this cluster" in logs
    assert result_of(logs)["samples"] == len(Results(folder).done()) == 2 * PROBLEMS
    assert set(serve.status().applications) == {APPLICATION}


@pytest.mark.slow
def test_stopped_job_that_is_submitted_again_succeeds(dashboard: str, tmp_path: Path) -> None:
    client, folder = JobSubmissionClient(dashboard), tmp_path / "run"

    def kept() -> int:
        return len(Results(folder).done())

    first = submit(dashboard, config(tmp_path, concurrency=1), folder)  # slow enough to be stopped
    wait_until(lambda: kept() >= FEW or client.get_job_status(first).is_terminal(), "the first samples")
    assert client.get_job_status(first) == JobStatus.RUNNING, client.get_job_logs(first)
    stop = [str(Path(sys.executable).parent / "ray"), "job", "stop", "--address", dashboard, first]
    subprocess.run(stop, capture_output=True, timeout=READY_S, check=True)
    wait_until(lambda: client.get_job_status(first).is_terminal(), "the end of the stopped job")
    assert client.get_job_status(first) == JobStatus.STOPPED
    before = kept()
    total = PROBLEMS * (len(MODES) + 1)
    assert FEW <= before < total

    second = submit(dashboard, config(tmp_path, concurrency=None), folder)
    wait_until(lambda: client.get_job_status(second).is_terminal(), "the end of the second job")
    logs = client.get_job_logs(second)
    assert client.get_job_status(second) == JobStatus.SUCCEEDED, logs
    assert kept() == total
    result = result_of(logs)
    assert result["samples"] == result["expected"] == total
    assert (folder / "report.html").is_file()
    wait_until(lambda: own_is_gone(dashboard), "the end of the service that the job started")


@pytest.mark.slow
def test_one_evaluation_tries_several_adapters_of_the_guider(dashboard: str, tmp_path: Path) -> None:
    client, folder = JobSubmissionClient(dashboard), tmp_path / "run"
    adapters = {"plain": None, "dpo": str(ADAPTER)}
    path = config(tmp_path, None, modes=["target", "guider", "guided"], alpha=[1.5], adapters=adapters)
    job = submit(dashboard, path, folder)
    twice = 2 * READY_S  # the job starts a service for each of the two sets of adapters
    wait_until(lambda: client.get_job_status(job).is_terminal(), "the end of the job", twice)
    assert client.get_job_status(job) == JobStatus.SUCCEEDED, client.get_job_logs(job)
    texts: dict[str, list[str]] = {}
    for sample in Results(folder).samples():
        texts.setdefault(f"{sample.key.mode} {sample.key.setting}", []).append(sample.text)
    assert {name: len(said) for name, said in texts.items()} == dict.fromkeys(
        ("target -", "guider -", "guided a1.5", "guider dpo", "guided a1.5-dpo"), PROBLEMS
    )
    assert texts["guider -"] != texts["guider dpo"], "the adapter was in the guider"
    assert texts["guided a1.5"] != texts["guided a1.5-dpo"]
    wait_until(lambda: own_is_gone(dashboard), "the end of the service that the job started")
