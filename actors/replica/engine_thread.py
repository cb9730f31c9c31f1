"""Runs the forwards of a model, and the threads on which these and reads of rows run. Imports no sockets, no torch."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import TypeAlias, TypeVar

from actors.engine.interface import Engine, Full, Held, KVMiss
from actors.replica.answers import Answer, answer_all
from actors.replica.scheduler import Chunk

__all__ = ["Engine", "Failed", "Result", "WorkerThread", "run_forward"]


@dataclass(frozen=True, slots=True)
class Failed:
    """The forward raised an error. The session's cache was dropped."""


@dataclass(frozen=True, slots=True)
class Unshared:
    """The blocks to fork are lost, or the cache has no room for them. Nothing was computed; retry without a fork."""


T = TypeVar("T")

# Held: a chunk was computed, and the extend has more.
Result: TypeAlias = Answer | Held | KVMiss | Full | Unshared | Failed


class WorkerThread:
    """Runs jobs one after another on a thread of its own. Call `start`, then `submit` or `call`, then `stop`.

    Jobs are passed through a plain queue, and each outcome is passed back by one callback on the event loop. The
    futures of an executor take three times as many wake-ups of threads.
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, work: Callable[[], T], done: Callable[[T | Exception], None]) -> None:
        """Run `work`, then call `done` on the caller's event loop with its result or error."""
        self._jobs.put(partial(_run, work, asyncio.get_running_loop(), done))

    async def call(self, work: Callable[[], T]) -> T:
        """Run `work` after the jobs already queued; return or raise its outcome. Hangs if the thread has ended."""
        outcome: asyncio.Future[T | Exception] = asyncio.get_running_loop().create_future()
        self.submit(work, lambda result: None if outcome.done() else outcome.set_result(result))
        result = await outcome
        if isinstance(result, Exception):
            raise result
        return result

    def stop(self) -> None:
        """End the thread after the jobs already queued. Does not wait."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # else its arrays would be kept until the next job


def _run(work: Callable[[], T], loop: asyncio.AbstractEventLoop, done: Callable[[T | Exception], None]) -> None:
    outcome: T | Exception
    try:
        outcome = work()
    except Exception as error:
        outcome = error
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(done, outcome)


def run_forward(engine: Engine, chunks: Sequence[Chunk], closing: Sequence[int]) -> list[Result]:
    """Fork and close sessions, run one forward, reduce its rows and sample drafts. Results in the order of `chunks`.

    closing: sessions whose cache is freed. If the engine raises, the cache of every chunk's session is dropped.
    """
    anew = {chunk.scheduled.item.session for chunk in chunks}.intersection(closing)
    for session in anew:
        engine.close(session)
    try:
        results: list[Result] = [Unshared()] * len(chunks)
        begun = [place for place, chunk in enumerate(chunks) if not chunk.forked or _fork(engine, chunk)]
        for session in closing:  # only now: forks may copy from a session that closes
            if session not in anew:
                engine.close(session)
        if not begun:
            return results
        for place, outcome in zip(begun, engine.extend([chunks[place].extend() for place in begun]), strict=True):
            results[place] = outcome
        done = [place for place, chunk in enumerate(chunks) if chunk.is_last and isinstance(results[place], Held)]
        for place, answer in zip(done, answer_all(engine, [chunks[place].scheduled for place in done]), strict=True):
            results[place] = answer
    except Exception:
        for chunk in chunks:
            engine.close(chunk.scheduled.item.session)
        raise
    return results


def _fork(engine: Engine, chunk: Chunk) -> bool:
    item = chunk.scheduled.item
    return engine.fork(item.session, item.tokens[: chunk.forked], chunk.forked_blocks, item.age)
