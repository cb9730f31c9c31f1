"""The service on Ray while its processes are killed or replaced: no stream gets other tokens."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI
from ray import serve

from actors.config import ServiceConfig, load_config
from cluster.launch import running_service
from router.app import MODEL_NAMES, bind
from tests.support.local_ray import APPLICATION, READY_S, actors, replicas_of, trio_args, wait_until
from tests.support.trio import chat_prompts

# Ray leaves sockets and child processes to its own exit handlers.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning:ray"),
]

STREAMS = 4
Stream = list[tuple[int, str]]  # token ids and their texts


def config(**changed: Any) -> ServiceConfig:
    args = trio_args() | {"batch_invariant": True, "deadlines": {"peer_timeout_s": 5}} | changed
    args["coordinator"]["replicas"] = {"min": 2, "max": 2}
    return load_config(args)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_service(config(), num_cpus=6, dashboard=True) as url:
        yield url


@pytest.fixture
async def openai(url: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=READY_S, max_retries=0) as openai:
        yield openai


class Streams:
    """The same streams each time, of some 30 messages each."""

    def __init__(self, openai: AsyncOpenAI) -> None:
        self._openai = openai
        self.messages = 0

    async def all(self) -> list[Stream]:
        texts = chat_prompts(STREAMS)
        return list(await asyncio.gather(*(self._one(seed, text) for seed, text in enumerate(texts))))

    async def flowing(self, messages: int = 8) -> None:
        """So many more messages have come."""
        async with asyncio.timeout(READY_S):
            until = self.messages + messages
            while self.messages < until:  # noqa: ASYNC110 - streams announce nothing
                await asyncio.sleep(0.01)

    async def _one(self, seed: int, text: str) -> Stream:
        heard: Stream = []
        extra = {"ignore_eos": True, "guidance": {"explain": True}}
        stream = await self._openai.chat.completions.create(
            model=APPLICATION,
            messages=[{"role": "user", "content": text}],
            seed=seed,
            temperature=1.0,
            max_tokens=250,
            stream=True,
            extra_body=extra,
        )
        async for chunk in stream:
            explained: Any = chunk.choices[0].model_extra
            heard += [(token["id"], token["text"]) for token in explained.get("guidance", {}).get("tokens", [])]
            self.messages += 1
        return heard


async def undisturbed(openai: AsyncOpenAI, url: str) -> list[Stream]:
    """What the streams are when every role is served and nobody disturbs them."""
    ready = partial(httpx.get, f"{url}/ready", timeout=READY_S)
    await asyncio.to_thread(wait_until, lambda: ready().status_code == 200, "every role being there")
    expected = await Streams(openai).all()
    assert [len(stream) for stream in expected] == [250] * STREAMS
    return expected


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("deployment", ["Coordinator", *MODEL_NAMES.values(), "Directory"])
async def test_a_replica_that_is_killed_changes_no_stream(openai: AsyncOpenAI, url: str, deployment: str) -> None:
    expected = await undisturbed(openai, url)
    streams = Streams(openai)
    running = asyncio.create_task(streams.all())
    await streams.flowing()
    victims = await asyncio.to_thread(replicas_of, deployment)
    for victim in victims:
        kill(victim.pid)
    assert await running == expected


async def test_a_controller_that_is_killed_changes_no_stream(openai: AsyncOpenAI, url: str) -> None:
    expected = await undisturbed(openai, url)
    streams = Streams(openai)
    running = asyncio.create_task(streams.all())
    await streams.flowing()
    (controller,) = await asyncio.to_thread(actors, "ServeController")
    kill(controller.pid)
    assert await running == expected


async def test_an_upgrade_of_everything_changes_no_stream(openai: AsyncOpenAI, url: str) -> None:
    expected = await undisturbed(openai, url)
    before = {actor.pid for actor in await asyncio.to_thread(replicas_of, "")}
    streams = Streams(openai)
    running = asyncio.create_task(streams.all())
    await streams.flowing()
    changed = bind(config(speculation={"drafts": 3}))  # whatever differs, every replica is replaced
    await asyncio.to_thread(serve.run, changed, name=APPLICATION, route_prefix="/")
    assert await running == expected
    await asyncio.to_thread(wait_until, lambda: not before & {a.pid for a in replicas_of("")}, "the old being gone")
    assert await undisturbed(openai, url) == expected
