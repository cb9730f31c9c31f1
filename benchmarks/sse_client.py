"""A client fast enough for the service: many streams of server-sent events, in a process of its own.

It records the arrival of bytes and parses them after the last stream has ended, so that parsing is not measured.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, cast
from urllib.parse import SplitResult, urlsplit

import httptools
import httpx
import uvloop

DEADLINE_S = 300.0  # of all streams of a round


class StreamFailed(RuntimeError):
    """A stream did not bring a whole answer; the message gives the reason."""


@dataclass(frozen=True, slots=True)
class Stream:
    """Times of one answer at the client, in seconds of one clock, and its tokens."""

    asked: float
    first: float  # when its first text came
    last: float  # when its last text came
    tokens: int
    messages: int
    chunks: tuple[bytes, ...] = ()  # the body as it came: one chunk of HTTP for each message of the application
    ids: tuple[int, ...] = ()  # of its tokens, if the request sets return_token_ids

    @property
    def inter_token_s(self) -> float:
        """The mean time from one token to the next: a message's tokens share the time since the one before."""
        return (self.last - self.first) / max(1, self.tokens - 1)


@dataclass(slots=True)
class StreamProtocol(asyncio.Protocol):
    """One request. httptools calls the methods `on_...`.

    done: ends with the response, or with StreamFailed when the connection is lost before.
    """

    request: bytes
    done: asyncio.Future[None]
    asked: float = 0.0
    retry_after_s: float | None = None
    bodies: list[tuple[float, bytes]] = field(default_factory=list)
    chunk_ends: list[int] = field(default_factory=list)  # how many bodies had come at the end of each chunk
    parser: Any = None
    transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.parser, self.transport = httptools.HttpResponseParser(self), transport
        self.asked = time.perf_counter()
        cast(asyncio.WriteTransport, transport).write(self.request)  # uvloop's is one without being its subclass

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after":
            self.retry_after_s = float(value)

    def on_body(self, body: bytes) -> None:
        self.bodies.append((time.perf_counter(), body))

    def on_chunk_complete(self) -> None:
        self.chunk_ends.append(len(self.bodies))

    def on_message_complete(self) -> None:
        assert self.transport is not None
        self.transport.close()
        if not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(StreamFailed(f"the connection was lost: {exc}"))

    @property
    def status(self) -> int:
        """HTTP status of the response."""
        return int(self.parser.get_status_code())

    def stream(self) -> Stream:
        """The answer. Raises StreamFailed unless it is complete."""
        if self.status != 200:
            raise StreamFailed(b"".join(body for _, body in self.bodies).decode())
        times: list[float] = []
        ids: list[int] = []
        usage: dict[str, Any] | None = None
        rest = b""
        for at, body in self.bodies:
            *events, rest = (rest + body).split(b"\n\n")
            for event in events:
                if event == b"data: [DONE]" or event.startswith(b":"):  # a comment keeps the connection alive
                    continue
                chunk = json.loads(event.removeprefix(b"data: "))
                if "error" in chunk:
                    raise StreamFailed(chunk["error"]["message"])
                usage = chunk.get("usage") or usage
                times += [at] * bool(chunk["choices"])
                ids += [token for choice in chunk["choices"] for token in choice.get("token_ids") or ()]
        if usage is None:
            raise StreamFailed("the stream ended without its usage")
        tokens = usage["completion_tokens"]
        return Stream(self.asked, times[0], times[-1], tokens, len(times), self._chunks(), tuple(ids))

    def _chunks(self) -> tuple[bytes, ...]:
        parts = [body for _, body in self.bodies]
        chunks = (b"".join(parts[start:end]) for start, end in pairwise([0, *self.chunk_ends]))
        return tuple(filter(None, chunks))  # the last chunk of a response is empty


async def read_streams(url: str, bodies: Sequence[dict[str, Any]]) -> list[Stream]:
    """Send all requests at once; returns their answers. url: the base URL.

    Raises StreamFailed if an answer is incomplete, TimeoutError.
    """
    loop = asyncio.get_running_loop()
    where = urlsplit(url)
    if where.hostname is None or where.port is None:
        raise ValueError(f"{url} names no host and port")
    host, port = where.hostname, where.port
    protocols = [StreamProtocol(http_request(where, body), loop.create_future()) for body in bodies]
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(*(loop.create_connection(partial(existing_protocol, r), host, port) for r in protocols))
        await asyncio.gather(*(protocol.done for protocol in protocols))
    return [protocol.stream() for protocol in protocols]


def read_all(url: str, bodies: Sequence[dict[str, Any]]) -> list[Stream]:
    """`read_streams` on a loop of its own, for a process that does nothing else."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(read_streams(url, bodies))


def await_answer(url: str, within_s: float, ended: Callable[[], bool] = lambda: False) -> None:
    """Wait until GET `url` answers with status 200.

    ended: true once nothing will answer any more. Raises EOFError then, and TimeoutError after `within_s` seconds.
    """
    until = time.monotonic() + within_s
    with httpx.Client() as client:
        while True:
            with suppress(httpx.TransportError):
                if client.get(url).status_code == 200:
                    return
            if ended():
                raise EOFError(f"the process behind {url} has ended")
            if time.monotonic() > until:
                raise TimeoutError(f"{url} did not answer within {within_s:g} s")
            time.sleep(0.1)


def existing_protocol(protocol: StreamProtocol) -> StreamProtocol:
    """Protocol factory that returns an existing protocol."""
    return protocol


def http_request(where: SplitResult, body: dict[str, Any]) -> bytes:
    """The bytes of a request over HTTP: a chat, or a completion if it has a `prompt`. where: the base URL."""
    content = json.dumps(body).encode()
    path = where.path.rstrip("/") + ("/v1/completions" if "prompt" in body else "/v1/chat/completions")
    head = f"POST {path} HTTP/1.1\r\nHost: {where.netloc}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content
