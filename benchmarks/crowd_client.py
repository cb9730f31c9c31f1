"""Clients that request more than a service can decode, in a process of their own, and the outcome of each request."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

from benchmarks.sse_client import Stream, StreamFailed, StreamProtocol, existing_protocol, http_request

Fate: TypeAlias = Literal["admitted", "refused", "hung", "failed"]
RAMP_S = 2.0  # of load before anything is measured
HUNG_S = 120.0  # without an end: longer than any client would wait
AGAIN_S = 1.0  # where a refusal names no time


@dataclass(frozen=True, slots=True)
class RequestOutcome:
    """One request. admitted: answered in full, `stream`. refused: by a 429. hung: no end. failed: any other end."""

    user: str
    fate: Fate
    stream: Stream | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Phase:
    """All requests of one load, and the interval in which throughput is measured: seconds of one clock."""

    began: float
    ended: float
    outcomes: Sequence[RequestOutcome]

    @property
    def tokens_per_s(self) -> float:
        """Tokens of admitted requests; those of an answer are spread evenly over the time in which they came."""
        tokens = sum(self._share(each.stream) * each.stream.tokens for each in self.outcomes if each.stream is not None)
        return tokens / (self.ended - self.began)

    def fates(self, user: str | None = None) -> Counter[Fate]:
        """Number of requests by outcome, of one user or of all."""
        return Counter(each.fate for each in self.outcomes if user in (None, each.user))

    def _share(self, stream: Stream) -> float:
        inside = min(self.ended, stream.last) - max(self.began, stream.first)
        return max(0.0, inside) / max(stream.last - stream.first, 1e-9)


class CrowdClient:
    """Requests answers of `tokens` tokens to the questions in turn. Loads run one at a time."""

    def __init__(self, url: str, model: str, questions: Sequence[str], tokens: int, seconds: float) -> None:
        self._where, self._seconds = urlsplit(url), seconds
        assert self._where.hostname is not None
        assert self._where.port is not None
        self._host, self._port = self._where.hostname, self._where.port
        self._model, self._questions, self._tokens = model, questions, tokens
        self._number = 0
        self._outcomes: list[RequestOutcome] = []

    async def closed(self, clients: int) -> Phase:
        """Closed loop: each client sends its next request after its answer, or after the Retry-After of a 429."""
        return await self._phase(*(self._repeating(f"client-{number}") for number in range(clients)))

    async def opened(self, rates: dict[str, float]) -> Phase:
        """Open loop: each user sends requests at a rate (1/s), at random times, whatever the earlier outcomes."""
        return await self._phase(*(self._pouring(user, rate) for user, rate in rates.items()))

    async def _phase(self, *loads: Any) -> Phase:
        self._outcomes = []
        self._began = time.perf_counter() + RAMP_S
        self._ends = self._began + self._seconds
        await asyncio.gather(*loads)
        return Phase(self._began, self._ends, self._outcomes)

    async def _repeating(self, user: str) -> None:
        while time.perf_counter() < self._ends:
            protocol = await self._ask(user)
            if self._outcomes[-1].fate != "admitted" or protocol.status != 200:
                again = AGAIN_S if protocol.retry_after_s is None else protocol.retry_after_s
                await asyncio.sleep(min(again, max(0.0, self._ends - time.perf_counter())))

    async def _pouring(self, user: str, rate: float) -> None:
        drawn, due = random.Random(user), time.perf_counter()
        async with asyncio.TaskGroup() as asking:
            while due < self._ends:
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                asking.create_task(self._ask(user))
                due += drawn.expovariate(rate)

    async def _ask(self, user: str) -> StreamProtocol:
        self._number += 1
        loop = asyncio.get_running_loop()
        protocol = StreamProtocol(http_request(self._where, self._body(user, self._number)), loop.create_future())
        try:
            async with asyncio.timeout(HUNG_S):
                await loop.create_connection(partial(existing_protocol, protocol), self._host, self._port)
                await protocol.done
        except TimeoutError:
            self._outcomes.append(RequestOutcome(user, "hung"))
        except (StreamFailed, OSError) as error:
            self._outcomes.append(RequestOutcome(user, "failed", why=str(error)))
        else:
            self._outcomes.append(_outcome_of(user, protocol))
        return protocol

    def _body(self, user: str, number: int) -> dict[str, Any]:
        return {
            "model": self._model,
            "user": user,
            "messages": [{"role": "user", "content": self._questions[number % len(self._questions)]}],
            "seed": number,
            "max_tokens": self._tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


def _outcome_of(user: str, protocol: StreamProtocol) -> RequestOutcome:
    if protocol.status == 429:
        return RequestOutcome(user, "refused", why="" if protocol.retry_after_s else "without Retry-After")
    try:
        return RequestOutcome(user, "admitted", protocol.stream())
    except StreamFailed as error:
        return RequestOutcome(user, "failed", why=str(error))
