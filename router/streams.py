"""Merges a request's generations into one sequence of batches; cancels them if the client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

from starlette.types import Receive

from actors.api.generation import Delta, Finished, Generate, Rejected
from router.backend import ApiError, Backend, rejection

INTERVAL_S = 0.05  # between two messages of a stream: at most 20 a second per choice

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection before the answer was complete."""


@dataclass(slots=True)
class Batch:
    """Events since the last batch, by choice."""

    deltas: dict[int, Delta] = field(default_factory=dict)
    finished: dict[int, Finished] = field(default_factory=dict)

    def add(self, choice: int, event: Delta | Finished) -> None:
        """Add an event of a choice."""
        if isinstance(event, Finished):
            self.finished[choice] = event
        else:
            self.deltas[choice] = self.deltas.get(choice, Delta()) + event


class Generations:
    """All sequences of a request, decoded concurrently. Leaving the context cancels those that still run.

    async with Generations(backend, sequences) as generations:
        async for batch in generations.batches(): ...
    """

    def __init__(
        self,
        backend: Backend,
        sequences: Sequence[Generate],
        interval_s: float = INTERVAL_S,
        idle_s: float | None = None,
    ) -> None:
        self._backend, self._sequences, self._interval_s, self._idle_s = backend, sequences, interval_s, idle_s
        self._batch = Batch()
        self._running = len(sequences)
        self._failure: Exception | None = None
        self._tokens: list[list[int]] = [[] for _ in sequences]
        self._has_events, self._ended = asyncio.Event(), asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [
            asyncio.create_task(self._pump(index, sequence)) for index, sequence in enumerate(self._sequences)
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await _cancel(*self._tasks)

    async def batches(self) -> AsyncIterator[Batch]:
        """Yield the first event at once, then at most one batch per interval, until every sequence has finished.

        Yields an empty batch after `idle_s` without an event.
        Raises the first failure of any sequence after the events before it; an ApiError gets the tokens so far.
        """
        clock = asyncio.get_running_loop().time
        due = clock()
        while self._running or self._has_events.is_set():
            try:
                async with asyncio.timeout(self._idle_s):
                    await self._has_events.wait()
            except TimeoutError:
                yield Batch()
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._ended.wait()
            self._has_events.clear()
            batch, self._batch = self._batch, Batch()
            if batch.deltas or batch.finished:
                yield batch
            if self._failure is not None:
                if isinstance(self._failure, ApiError) and any(self._tokens):
                    self._failure.token_ids_so_far = self._tokens
                raise self._failure
            due = clock() + self._interval_s

    async def _pump(self, choice: int, sequence: Generate) -> None:
        events = self._backend.generate(sequence)
        try:
            async for event in events:
                if isinstance(event, Rejected):
                    raise rejection(event)
                if isinstance(event, Finished) and event.reason == "error":
                    raise ApiError(event.error or "the generation failed")
                self._batch.add(choice, event)
                if isinstance(event, Finished):
                    break
                self._tokens[choice] += event.tokens
                self._has_events.set()
            else:
                raise ApiError("the generation ended without saying why")
        except Exception as error:
            self._failure = self._failure or error
        finally:
            self._running -= 1
            if self._failure or not self._running:
                self._ended.set()
            self._has_events.set()
            close = getattr(events, "aclose", None)
            if close is not None:
                await close()


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. Cancels it and raises ClientGone if the client disconnects first.

    The request's body must have been read: afterwards `receive` only reports the disconnect.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        await _cancel(working, watching)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
