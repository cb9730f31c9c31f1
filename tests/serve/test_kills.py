"""Replicas of the shared service are killed while it streams: every stream gets the tokens that it would have got."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from router.app import MODEL_NAMES
from tests.support.local_ray import SharedRay, replicas_of, wait_until_served
from tests.support.streams import Stream, Streams, undisturbed

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def expected(shared_ray: SharedRay) -> list[Stream]:
    """The streams while nothing is killed."""
    return asyncio.run(undisturbed(shared_ray.url))


@pytest.mark.parametrize("deployment", [*MODEL_NAMES.values(), "Directory", "Coordinator"])
async def test_killed_replica_changes_no_stream(shared_ray: SharedRay, expected: list[Stream], deployment: str) -> None:
    await asyncio.to_thread(wait_until_served, shared_ray.url)
    streams = Streams(shared_ray.url)
    running = asyncio.create_task(streams.read())
    await streams.flowing()
    (victim,) = await asyncio.to_thread(replicas_of, deployment)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    assert await running == expected
