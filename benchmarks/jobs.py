"""Measures a job's overhead: the same prompts through a job, and straight to a coordinator.

    python -m benchmarks.jobs [--task math500 --data FOLDER] [--limit 100] [--tokens 64] [--sessions 32] [--rounds 3]
        [--save]

The embedded trio twice: as processes around a coordinator in this one, as `benchmarks.decode` runs it, and as a service
on Ray that `cluster.jobs.evaluate` asks, grades and keeps. Rounds alternate. Without `--data` the prompts are the
multi-hop questions; with it, those of `FOLDER/TASK.jsonl`. The last line is a JSON object; job_over_direct is the
median of the rounds' ratios of tokens a second.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from actors.api.generation import Generate
from actors.coordinator.coordinator import Coordinator
from actors.preflight import load_tokenizers
from benchmarks.processes import launcher
from benchmarks.results_file import arguments, console, progress, publish
from benchmarks.shapes import SHAPES, service_config
from benchmarks.workers import service
from cluster.jobs.client import Client
from cluster.jobs.config import Evaluation, checked
from cluster.jobs.connecting import Connection, connected
from cluster.jobs.evaluate import evaluate
from cluster.jobs.results import Results
from cluster.jobs.workload import Workload, load_workload
from tests.support.local_service import decode

CACHE_TOKENS = 65_536


@dataclass(slots=True)
class Rates:
    """Tokens per second of each round."""

    job: list[float] = field(default_factory=list)
    direct: list[float] = field(default_factory=list)

    def result(self, sessions: int, prompts: int) -> dict[str, Any]:
        """The benchmark's JSON object."""
        ratios = [job / direct for job, direct in zip(self.job, self.direct, strict=True)]
        return {
            "sessions": sessions,
            "prompts": prompts,
            "job_tps": round(median(self.job), 1),
            "direct_tps": round(median(self.direct), 1),
            "job_over_direct": round(median(ratios), 3),
        }


def evaluation(folder: Path, task: str, data: Path | None, limit: int, tokens: int, sessions: int) -> Evaluation:
    """One guided answer to each of the task's first problems."""
    return checked(
        {
            "run": str(folder / "run"),
            "tasks": [{"task": task, "limit": limit, "samples": 1, "max_tokens": tokens}],
            "modes": ["guided"],
            "concurrency": sessions,
            "data": None if data is None else str(data),
        }
    )


async def job(workload: Workload, connection: Connection) -> float:
    """Tokens a second of a whole job on a running service."""
    folder = workload.evaluation.run
    shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    await evaluate(workload, connection, folder, Console(quiet=True))
    seconds = time.perf_counter() - began
    return sum(sample.tokens for sample in Results(folder).samples()) / seconds


async def direct(coordinator: Coordinator, requests: Sequence[Generate], sessions: int) -> float:
    """Tokens a second of the same requests, `sessions` at once, straight to a coordinator."""
    waiting, tokens, began = iter(requests), 0, time.perf_counter()

    async def ask() -> None:
        nonlocal tokens
        for request in waiting:
            answer = await decode(coordinator, request)
            tokens += len(answer.tokens)

    await asyncio.gather(*(ask() for _ in range(sessions)))
    return tokens / (time.perf_counter() - began)


@asynccontextmanager
async def trio(folder: Path, sessions: int, threads: int) -> AsyncIterator[Coordinator]:
    """The trio as `benchmarks.decode` runs it."""
    shape = SHAPES["trio"]
    config = service_config(shape, folder, cache_tokens=CACHE_TOKENS, sessions=sessions, speculate=True)
    async with launcher("processes", threads) as launch:
        async with service(shape, config, 1.0, threads, launch) as served:
            yield served.coordinator


async def measure(
    workload: Workload, connection: Connection, threads: int, rounds: int, done: Callable[[], None]
) -> Rates:
    """Both ways in turn; `done` is called after each round."""
    sessions = workload.evaluation.concurrency or 1
    client = Client(connection.backend, connection.service, load_tokenizers(connection.service))
    requests = [replace(client.request(item), interval_s=0.0) for item in workload.items()]
    rates = Rates()
    with tempfile.TemporaryDirectory() as folder:
        async with trio(Path(folder), sessions, threads) as coordinator:
            await direct(coordinator, requests[:sessions], sessions)  # what is slow once is not measured
            for _ in range(rounds):
                rates.direct.append(await direct(coordinator, requests, sessions))
                rates.job.append(await job(workload, connection))
                done()
    return rates


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--task", default="multihop", help="a shipped task (multihop)")
    parser.add_argument("--data", type=Path, help="a folder with a copy of the task's data")
    parser.add_argument("--limit", type=int, default=100, help="the task's first problems (100)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer at most (64)")
    parser.add_argument("--sessions", type=int, default=32, help="asked at once (32)")
    parser.add_argument("--threads", type=int, default=1, help="of each model that runs beside Ray (1)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ["RAY_ADDRESS"] = "local"
    with tempfile.TemporaryDirectory() as folder, progress(console()) as bar:
        settings = (options.task, options.data, options.limit, options.tokens, options.sessions)
        workload = load_workload(evaluation(Path(folder), *settings))
        shown = bar.add_task("rounds", total=options.rounds)
        with connected(workload.evaluation.service, bar.console.print) as connection:
            measured = measure(workload, connection, options.threads, options.rounds, lambda: bar.advance(shown))
            rates = asyncio.run(measured)
    prompts = sum(len(asked) for _, asked in workload.tasks)
    name = f"jobs-{options.task}"
    publish(name, rates.result(options.sessions, prompts), options.save)


if __name__ == "__main__":
    main()
