"""Streams, half of them in a grammar, that run while a process of the service is killed, and their right tokens."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from openai import AsyncOpenAI

from tests.support.local_ray import APPLICATION, READY_S, wait_until_served
from tests.support.trio import chat_prompts

STREAMS = 4
LENGTH = 250  # tokens of a stream
GRAMMAR = f"( [a-z]{{1,9}}){{{LENGTH + 50},}}"  # of every second stream; no token has two words: none reaches the end
Stream = list[tuple[int, str]]  # token ids and their texts


class Streams:
    """The same streams each time, of some 30 messages each."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.messages = 0
        self._came = asyncio.Condition()

    async def read(self) -> list[Stream]:
        """All streams to their ends."""
        texts = chat_prompts(STREAMS)
        async with AsyncOpenAI(base_url=f"{self._url}/v1", api_key="none", timeout=READY_S, max_retries=0) as openai:
            return await asyncio.gather(*(self._one(openai, seed, text) for seed, text in enumerate(texts)))

    async def flowing(self, messages: int = 8) -> None:
        """Return when this many more messages have arrived."""
        until = self.messages + messages
        async with asyncio.timeout(READY_S), self._came:
            await self._came.wait_for(lambda: self.messages >= until)

    async def _one(self, openai: AsyncOpenAI, seed: int, text: str) -> Stream:
        tokens: Stream = []
        grammar = {"structured_outputs": {"regex": GRAMMAR}} if seed % 2 else {}
        stream = await openai.chat.completions.create(
            model=APPLICATION,
            messages=[{"role": "user", "content": text}],
            seed=seed,
            temperature=1.0,
            max_tokens=LENGTH,
            stream=True,
            extra_body={"ignore_eos": True, "guidance": {"explain": True}, **grammar},
        )
        async for chunk in stream:
            explained: Any = chunk.choices[0].model_extra
            tokens += [(token["id"], token["text"]) for token in explained.get("guidance", {}).get("tokens", [])]
            async with self._came:
                self.messages += 1
                self._came.notify_all()
        return tokens


async def undisturbed(url: str) -> list[Stream]:
    """The streams of a service whose roles are all served, while nothing is killed."""
    await asyncio.to_thread(wait_until_served, url)
    streams = await Streams(url).read()
    assert [len(stream) for stream in streams] == [LENGTH] * STREAMS
    obey = [re.fullmatch("( [a-z]{0,9})+", "".join(text for _, text in stream)) is not None for stream in streams]
    assert obey == [False, True] * (STREAMS // 2)
    return streams
