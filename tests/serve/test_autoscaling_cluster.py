"""Autoscaling under load: coordinators, routers, model roles and nodes, each by the autoscaler of a real cluster.

Streams are open all the time; one that ends is requested again. Each has the tokens of a stream on an idle service.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from ray import serve

from actors.config import load_config
from actors.directory import Endpoint, Snapshot
from cluster.launch import LOOPBACK, free_port
from router.app import bind
from tests.support.growing_ray import growing_cluster, nodes
from tests.support.local_ray import APPLICATION, READY_S, trio_args, wait_until
from tests.support.trio import chat_prompts

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FAST = {"min": 1, "max": 2, "upscale_delay_s": 0.5, "downscale_delay_s": 2, "look_back_s": 1.5}
CARD = "card"  # a resource in place of a GPU: `batch_invariant` runs on CPUs
CACHE_TOKENS = 4_096
QUESTIONS = 2
LONG, SHORT = 200, 100  # tokens of an answer
BUSY = 16  # streams that overload one replica of any deployment


@dataclass(frozen=True)
class Service:
    """A service that may grow, and the tokens of its answer to each question while no other stream is open."""

    url: str
    alone: list[list[int]]


@pytest.fixture(scope="module")
def service(no_shared_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One replica of each deployment, on the head; the target has its only card."""
    args = trio_args() | {
        "batch_invariant": True,
        "speculation": {"drafts": 0, "lookup": False},
    }  # so that answers take long
    args["models"]["target"] |= {"resources": {CARD: 1}, "num_cpus": 0, "cache_tokens": CACHE_TOKENS}
    args["models"]["target"]["replicas"] = FAST | {"target_cache": 0.4}
    args["coordinator"] = {"replicas": FAST | {"target_ongoing": 5}}
    args["router"] = {"replicas": FAST | {"target_ongoing": 6}}
    folder, port = tmp_path_factory.mktemp("autoscaler"), free_port()
    url = f"http://{LOOPBACK}:{port}"
    with growing_cluster(folder, head={"CPU": 3, CARD: 1}, worker={"CPU": 1, CARD: 1}):
        serve.start(proxy_location="HeadOnly", http_options={"host": LOOPBACK, "port": port})
        serve.run(bind(load_config(args)), name=APPLICATION, route_prefix="/")
        wait_until(lambda: httpx.get(f"{url}/ready", timeout=READY_S).status_code == 200, "every role being there")
        yield Service(url, asyncio.run(one_by_one(url)))


@pytest.fixture
async def client(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=service.url, timeout=READY_S) as client:
        yield client


async def ask(client: httpx.AsyncClient, question: int, length: int) -> list[int]:
    """The tokens of a streamed answer, which must be complete."""
    message = {"role": "user", "content": chat_prompts(QUESTIONS)[question]}
    body = {"model": APPLICATION, "messages": [message], "seed": question, "temperature": 1, "stream": True}
    body |= {"ignore_eos": True, "max_tokens": length, "return_token_ids": True}
    tokens: list[int] = []
    reasons = []
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                tokens += [token for choice in chunk["choices"] for token in choice["token_ids"]]
                reasons += [choice["finish_reason"] for choice in chunk["choices"]]
    assert reasons[-1] == "length"
    assert len(tokens) == length
    return tokens


async def one_by_one(url: str) -> list[list[int]]:
    async with httpx.AsyncClient(base_url=url, timeout=READY_S) as client:
        return [await ask(client, question, LONG) for question in range(QUESTIONS)]


@contextlib.asynccontextmanager
async def streams(client: httpx.AsyncClient, service: Service, count: int, length: int) -> AsyncIterator[None]:
    """Keep `count` streams open until the end of the context, and read them to their ends. None may lose a token.

    Their first answers differ in length, so that they end one by one and the load stays the same.
    """
    questions = itertools.cycle(range(QUESTIONS))
    open_still = True

    async def keep_asking(first: int) -> None:
        for tokens in itertools.chain([first], itertools.repeat(length)):
            question = next(questions)
            assert await ask(client, question, tokens) == service.alone[question][:tokens]
            if not open_still:
                return

    async with asyncio.TaskGroup() as group:
        for nth in range(1, count + 1):
            group.create_task(keep_asking(length * nth // count))
        yield
        open_still = False


async def eventually(reached: Callable[[], bool], what: str) -> None:
    """wait_until, while streams are read."""
    await asyncio.to_thread(wait_until, reached, what)


def replicas(deployment: str) -> list[dict[str, Any]]:
    """The controller's details of each replica that has not ended."""
    details = serve.context._get_global_client().get_serve_details()
    found: list[dict[str, Any]] = details["applications"][APPLICATION]["deployments"][deployment]["replicas"]
    return found


def running(deployment: str) -> int:
    return sum(replica["state"] == "RUNNING" for replica in replicas(deployment))


def targets() -> list[Endpoint]:
    """The target's replicas that are not stopping, from the directory."""
    directory = serve.get_deployment_handle("Directory", APPLICATION)
    snapshot: Snapshot = directory.snapshot.remote().result(timeout_s=READY_S)
    return [endpoint for endpoint in snapshot.endpoints if endpoint.role == "target" and not endpoint.stopping]


async def test_coordinators_and_routers_follow_the_open_streams(service: Service, client: httpx.AsyncClient) -> None:
    async with streams(client, service, BUSY, SHORT):
        await eventually(lambda: running("Coordinator") == 2, "a second coordinator")
        await eventually(lambda: running("Router") == 2, "a second router")
    async with streams(client, service, 2, LONG):
        await eventually(lambda: len(replicas("Coordinator")) == 1, "the end of a coordinator")
        await eventually(lambda: len(replicas("Router")) == 1, "the end of a router")
    assert len(replicas("Target")) == 1


async def test_node_is_added_for_a_second_target_and_removed_after_it(
    service: Service, client: httpx.AsyncClient
) -> None:
    assert nodes() == []
    async with streams(client, service, BUSY, LONG):
        await eventually(lambda: len(replicas("Target")) == 2, "a target that awaits a card")
        await eventually(lambda: running("Target") == 2, "a second target")
        assert set(nodes()) < {replica["node_id"] for replica in replicas("Target")}
        await eventually(lambda: len([t for t in targets() if t.sessions]) == 2, "sessions on both targets")
        assert running("Guider") == running("GuiderBase") == 1
    async with streams(client, service, 2, LONG):
        await eventually(lambda: len(replicas("Target")) == 1, "the end of a target")
        await eventually(lambda: nodes() == [], "the end of the node")
