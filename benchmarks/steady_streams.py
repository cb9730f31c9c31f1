"""Keeps a number of streams over HTTP open, and compares each with the answer of an undisturbed service."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import httpx

from actors.api.generation import Finished, Role
from actors.config import ServiceConfig
from actors.text.tokenizer import RoleTokenizer
from cluster.demo.task import questions
from router.request_planning import plan_chat
from router.schema import ChatRequest, parse
from tests.support.local_service import decode, load_engines, local_service

HANG_S = 150.0  # without a message, after which a stream counts as lost: longer than the service's own deadlines
REFUSED_S = 0.5  # before a request that was refused is sent again
_SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0.6, "top_p": 0.95},
    {"temperature": 1, "frequency_penalty": 0.2},
    {"temperature": 1, "top_k": 50, "min_p": 0.01},
)
_GUIDANCE: tuple[dict[str, Any], ...] = ({"alpha": 1.0}, {"alpha": 0.5}, {"alpha": 1.0, "warmup_tokens": 100})

Outcome = Literal["open", "ended", "cancelled", "lost"]


@dataclass(frozen=True, slots=True)
class Case:
    """A request's body, and its answer by an undisturbed service."""

    body: dict[str, Any]
    ids: list[int]
    text: str
    counts: dict[str, int]


@dataclass(slots=True)
class StreamRecord:
    """One stream at the client. marks: the times of its request and of each message, on `time.monotonic`."""

    case: Case
    marks: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    outcome: Outcome = "open"
    why: str = ""  # it was lost

    def add(self, chunk: dict[str, Any]) -> None:
        """Add one event. Raises StreamLost if it reports that the generation failed."""
        if "error" in chunk:
            raise StreamLost(chunk["error"]["message"])
        for choice in chunk["choices"]:
            self.ids += [token["id"] for token in choice.get("guidance", {"tokens": []})["tokens"]]
            self.text += choice["delta"].get("content", "") + choice["delta"].get("reasoning", "")
            self.finish = choice["finish_reason"] or self.finish
        if usage := chunk.get("usage"):
            self.counts = {"completion": usage["completion_tokens"]} | {
                name: usage["guidance"][f"{name}_tokens"] for name in ("guided", "changed")
            }

    def differs(self) -> str | None:
        """The difference of the stream, as far as it came, from its case in words; None if there is none."""
        ids = self.case.ids if self.case.body["guidance"]["explain"] else []
        if self.ids != ids[: len(self.ids)] or not self.case.text.startswith(self.text):
            same = next((i for i, (a, b) in enumerate(zip(self.ids, ids, strict=False)) if a != b), None)
            return f"other tokens or text (the first other token: {same})"
        if self.outcome != "ended":
            return None
        if self.ids != ids or self.text != self.case.text:
            return f"{len(self.ids)} of {len(ids)} tokens, {len(self.text)} of {len(self.case.text)} characters"
        return None if self.counts == self.case.counts else f"counts {self.counts} instead of {self.case.counts}"

    def silence(self, at: float, window_s: float) -> float | None:
        """Seconds from `at` to the end of the longest silence that holds a moment of the window after it.

        A silence that began later counts from its own beginning. None: the stream was not there, or was lost.
        """
        met = [
            after - max(before, at) for before, after in pairwise(self.marks) if before < at + window_s and after > at
        ]
        return max(met, default=None)


class StreamLost(RuntimeError):
    """A stream ended without its whole answer."""


def requests(model: str, count: int, lengths: tuple[int, int], seed: int) -> list[dict[str, Any]]:
    """Bodies of `count` different requests whose answers have between so many tokens, evenly on a logarithmic scale."""
    draw = random.Random(seed)
    low, high = lengths
    return [
        {
            "model": model,
            "messages": [{"role": "user", "content": question.text}],
            "seed": draw.randrange(1 << 31),
            "max_tokens": round(low * (high / low) ** draw.random()),
            "ignore_eos": True,
            "guidance": {**_GUIDANCE[i % len(_GUIDANCE)], "explain": i % 2 == 0},
            "stream": True,
            "stream_options": {"include_usage": True},
            **_SAMPLINGS[i % len(_SAMPLINGS)],
        }
        for i, question in enumerate(questions("held_out", 3, count))
    ]


async def cases(config: ServiceConfig, bodies: Sequence[dict[str, Any]]) -> list[Case]:
    """Each request with its answer by an undisturbed service in this process. config: batch-invariant."""
    async with local_service(config, load_engines(config)) as service:
        return await asyncio.gather(*(_case(service.coordinators[0], config, service.tokenizers, b) for b in bodies))


async def _case(
    coordinator: Any, config: ServiceConfig, tokenizers: Mapping[Role, RoleTokenizer], body: dict[str, Any]
) -> Case:
    plan = plan_chat(parse(ChatRequest, body), config, tokenizers, "reference")
    answer = await decode(coordinator, plan.sequences[0])
    assert isinstance(answer.end, Finished)
    assert answer.end.reason == "length", answer.end
    usage = answer.end.usage
    counts = {"completion": usage.completion_tokens, "guided": usage.guided_tokens, "changed": usage.changed_tokens}
    return Case(body, answer.tokens, answer.reasoning + answer.content, counts)


class Streams:
    """A constant number of streams: where one ends, the next begins. `run` in a task, then `stop` and await it.

    cancelled: the share of streams whose client goes away after some seconds, evenly up to `patience_s`.
    """

    def __init__(
        self,
        url: str,
        asked: Sequence[Case],
        count: int,
        draw: random.Random,
        cancelled: float = 0,
        patience_s: float = 30,
    ) -> None:
        self.records: list[StreamRecord] = []
        self.refused = 0  # requests that were not taken on and sent again
        self._url, self._asked, self._count, self._draw = url, asked, count, draw
        self._cancelled, self._patience_s = cancelled, patience_s
        self._stopped = False

    def stop(self) -> None:
        """Begin no further stream."""
        self._stopped = True

    async def run(self) -> None:
        """Read until all streams have ended after `stop`."""
        timeout = httpx.Timeout(10, read=HANG_S)
        limits = httpx.Limits(max_connections=2 * self._count, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=self._url, timeout=timeout, limits=limits) as client:
            await asyncio.gather(*(self._one_after_another(client) for _ in range(self._count)))

    def open(self) -> list[StreamRecord]:
        """Streams that are open now."""
        return [record for record in self.records if record.outcome == "open"]

    def flowing(self, within_s: float) -> bool:
        """True if each open stream has had a message within the last so many seconds."""
        since = time.monotonic() - within_s
        return all(len(record.marks) > 1 and record.marks[-1] >= since for record in self.open())

    async def _one_after_another(self, client: httpx.AsyncClient) -> None:
        while not self._stopped:
            record = StreamRecord(self._draw.choice(self._asked), [time.monotonic()])
            self.records.append(record)
            leaves = self._draw.random() < self._cancelled
            try:
                async with asyncio.timeout(self._draw.uniform(0, self._patience_s) if leaves else None):
                    await self._read(client, record)
                record.outcome = "ended"
            except TimeoutError:
                record.outcome = "cancelled"
            except (httpx.HTTPError, StreamLost, json.JSONDecodeError) as error:
                record.outcome, record.why = "lost", f"{type(error).__name__}: {error}"

    async def _read(self, client: httpx.AsyncClient, record: StreamRecord) -> None:
        while True:
            async with client.stream("POST", "/v1/chat/completions", json=record.case.body) as response:
                if response.status_code == 200:
                    return await self._follow(response, record)
                if response.status_code not in (429, 503):
                    raise StreamLost(f"status {response.status_code}: {(await response.aread()).decode()}")
                self.refused += 1
                after = float(response.headers.get("Retry-After", REFUSED_S))
            await asyncio.sleep(after)

    async def _follow(self, response: httpx.Response, record: StreamRecord) -> None:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                record.marks.append(time.monotonic())
                record.add(json.loads(line.removeprefix("data: ")))
            elif line == "data: [DONE]" and record.finish == "length":
                return
        raise StreamLost("the stream ended before its answer did")
