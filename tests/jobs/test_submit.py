"""A real `ray job submit` to a cluster of this machine, as the README says it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray import serve
from ray.job_submission import JobStatus, JobSubmissionClient

from benchmarks.effect import ADAPTER, MODES
from cluster.jobs.results import Results
from cluster.launch import local_ray
from tests.support.local_ray import READY_S, ROOT, trio_args, wait_until

# Ray leaves sockets and child processes to its own exit handlers.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning:ray"),
]

PROBLEMS = 16
FEW = 8


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """The address of the dashboard of a cluster without a service."""
    with local_ray(num_cpus=2, dashboard=True):
        yield f"http://{ray._private.worker.get_dashboard_url()}"


def config(tmp_path: Path, concurrency: int | None, **changed: Any) -> Path:
    """An evaluation of all modes, and a service in exact mode to bring up for it."""
    application = {
        "name": "thinklogit",
        "import_path": "router.app:build",
        "args": trio_args() | {"batch_invariant": True},
    }
    service = tmp_path / "service.yaml"
    service.write_text(yaml.safe_dump({"applications": [application]}), encoding="utf-8")
    path = tmp_path / "config.yaml"
    given: dict[str, Any] = {
        "run": "runs/never",  # what a submitted job must not use
        "service": str(service),
        "tasks": [{"task": "multihop", "limit": PROBLEMS}],
        "alpha": [0.5, 1.0],
        "concurrency": concurrency,
    }
    path.write_text(yaml.safe_dump(given | changed), encoding="utf-8")
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


def test_a_submitted_job_is_stopped_submitted_again_and_succeeds(dashboard: str, tmp_path: Path) -> None:
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
    result = json.loads(next(line for line in reversed(logs.splitlines()) if line.startswith("{")))
    assert result["samples"] == result["expected"] == total
    assert (folder / "report.html").is_file()
    wait_until(lambda: not serve.status().applications, "the end of the service that the job brought up")


def test_adapters_of_the_guider_take_turns_in_one_evaluation(dashboard: str, tmp_path: Path) -> None:
    client, folder = JobSubmissionClient(dashboard), tmp_path / "run"
    adapters = {"plain": None, "dpo": str(ADAPTER)}
    path = config(tmp_path, None, modes=["target", "guider", "guided"], alpha=[1.5], adapters=adapters)
    job = submit(dashboard, path, folder)
    wait_until(lambda: client.get_job_status(job).is_terminal(), "the end of the job")
    assert client.get_job_status(job) == JobStatus.SUCCEEDED, client.get_job_logs(job)
    texts: dict[str, list[str]] = {}
    for sample in Results(folder).samples():
        texts.setdefault(f"{sample.key.mode} {sample.key.setting}", []).append(sample.text)
    assert {name: len(said) for name, said in texts.items()} == dict.fromkeys(
        ("target -", "guider -", "guided a1.5", "guider dpo", "guided a1.5-dpo"), PROBLEMS
    )
    assert texts["guider -"] != texts["guider dpo"], "the adapter was in the guider"
    assert texts["guided a1.5"] != texts["guided a1.5-dpo"]
    wait_until(lambda: not serve.status().applications, "the end of the service that the job brought up")
