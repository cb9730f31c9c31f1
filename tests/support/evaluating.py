"""A process that evaluates the embedded trio: `python -m tests.support.evaluating CONFIG`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from rich.console import Console

from cluster.jobs.config import load_evaluation
from cluster.jobs.connecting import Connection
from cluster.jobs.evaluate import evaluate
from cluster.jobs.workload import load_workload
from tests.support.local_backend import LocalBackend
from tests.support.local_service import load_engines, local_service, trio_config


async def main(config: Path) -> None:
    """Run the job with replicas, sockets and a coordinator in this process, without Ray."""
    workload = load_workload(load_evaluation(config))
    service = trio_config()
    async with local_service(service, load_engines(service)) as local:
        connection = Connection(LocalBackend(local), service)
        await evaluate(workload, connection, workload.evaluation.run, Console(stderr=True))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
