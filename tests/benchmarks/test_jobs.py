"""The job benchmark: a job's requests and its ratio."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from actors.api.generation import Role
from actors.replica.engine_thread import Engine
from benchmarks.jobs import Rates, direct, evaluation, job
from cluster.jobs.client import Client
from cluster.jobs.connecting import Connection
from cluster.jobs.results import Results
from cluster.jobs.workload import load_workload
from tests.support.local_backend import LocalBackend
from tests.support.local_service import local_service, trio_config


async def test_a_job_answers_the_same_prompts_as_direct_requests(
    trio_engines: Mapping[Role, Engine], tmp_path: Path
) -> None:
    workload = load_workload(evaluation(tmp_path, "multihop", None, limit=3, tokens=64, sessions=2))
    async with local_service(trio_config(), trio_engines) as service:
        connection = Connection(LocalBackend(service), service.config)
        coordinator = service.coordinators[0]
        assert await job(workload, connection) > 0
        asked = coordinator.load().tokens
        client = Client(connection.backend, service.config, service.tokenizers)
        requests = [client.request(item) for item in workload.items()]
        assert await direct(coordinator, requests, 2) > 0
        assert coordinator.load().tokens == 2 * asked, "each was asked once in either way"
        texts = [sample.text for sample in Results(workload.evaluation.run).samples()]
    assert len(texts) == len(requests) == 3
    assert all(texts)


def test_the_ratio_is_the_median_of_the_rounds_ratios() -> None:
    result = Rates(job=[80.0, 90.0, 10.0], direct=[100.0, 100.0, 100.0]).result(sessions=4, prompts=7)
    assert result == {"sessions": 4, "prompts": 7, "job_tps": 80.0, "direct_tps": 100.0, "job_over_direct": 0.8}
