"""The service on Ray with two coordinators while its processes are killed or replaced: no stream gets other tokens."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from ray import serve

from actors.config import ServiceConfig, load_config
from cluster.launch import running_service
from router.app import MODEL_NAMES, bind
from tests.support.local_ray import (
    APPLICATION,
    actors,
    ray_settings,
    replicas_of,
    trio_args,
    wait_until,
    wait_until_served,
)
from tests.support.streams import Stream, Streams, undisturbed

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def config(**changed: Any) -> ServiceConfig:
    args = trio_args() | {"batch_invariant": True, "deadlines": {"peer_timeout_s": 5}} | changed
    args["coordinator"]["replicas"] = {"min": 2, "max": 2}
    return load_config(args)


@dataclass(frozen=True)
class Service:
    """A service, and its streams while nothing is killed."""

    url: str
    undisturbed: list[Stream]


@pytest.fixture(scope="module")
def service(no_shared_ray: None) -> Iterator[Service]:
    with ray_settings(), running_service(config(), num_cpus=6, dashboard=True) as url:
        yield Service(url, asyncio.run(undisturbed(url)))


async def flowing(service: Service) -> asyncio.Task[list[Stream]]:
    """The streams, once all roles are served and messages arrive."""
    await asyncio.to_thread(wait_until_served, service.url)
    streams = Streams(service.url)
    running = asyncio.create_task(streams.read())
    await streams.flowing()
    return running


def kill(pid: int | None) -> None:
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("deployment", ["Coordinator", *MODEL_NAMES.values(), "Directory"])
async def test_killed_replicas_change_no_stream(service: Service, deployment: str) -> None:
    running = await flowing(service)
    for victim in await asyncio.to_thread(replicas_of, deployment):
        kill(victim.pid)
    assert await running == service.undisturbed


async def test_killed_controller_changes_no_stream(service: Service) -> None:
    running = await flowing(service)
    (controller,) = await asyncio.to_thread(actors, "ServeController")
    kill(controller.pid)
    assert await running == service.undisturbed


async def test_upgrade_of_every_deployment_changes_no_stream(service: Service) -> None:
    def pids() -> set[int | None]:
        return {actor.pid for actor in actors(f"ServeReplica:{APPLICATION}:")}

    running = await flowing(service)
    before = await asyncio.to_thread(pids)
    changed = bind(config(speculation={"drafts": 3}))  # whatever differs, every replica is replaced
    await asyncio.to_thread(serve.run, changed, name=APPLICATION, route_prefix="/")
    assert await running == service.undisturbed
    await asyncio.to_thread(wait_until, lambda: not before & pids(), "the end of every old replica")
    assert await undisturbed(service.url) == service.undisturbed
