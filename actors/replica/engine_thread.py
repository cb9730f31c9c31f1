"""One forward of a model: what goes in, what comes out, and the engine's own thread. No wire, no torch."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeAlias, TypeVar

from actors.engine.interface import Engine, Full, Held, KVMiss
from actors.replica.answers import SampledDraft, answer_all
from actors.replica.scheduler import Chunk
from actors.wire.replies import Answer

__all__ = ["Engine", "Failed", "ForwardThread", "Result", "run_forward"]


@dataclass(frozen=True, slots=True)
class Failed:
    """The forward raised: the session's cache is dropped."""


@dataclass(frozen=True, slots=True)
class Unshared:
    """What was to be forked is gone, or there is no room for it: nothing was computed, it must go on by itself."""


T = TypeVar("T")

# Held: a chunk is done and more is to come.
Result: TypeAlias = Answer | SampledDraft | Held | KVMiss | Full | Unshared | Failed


class ForwardThread:
    """Runs forwards one after another on a thread of its own. `start`, then `run`, then `stop`.

    Forwards take their turn through a plain queue, and each result comes back in one call on the event loop: an
    executor's futures cost three times as many wake-ups of threads.
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def run(
        self,
        engine: Engine,
        chunks: Sequence[Chunk],
        closing: Sequence[int],
        done: Callable[[list[Result] | Exception], None],
    ) -> None:
        """Run a forward (see `run_forward`); then `done` on the caller's event loop with what it gave or raised."""
        work = partial(run_forward, engine, chunks, closing)
        self._jobs.put(_Job(asyncio.get_running_loop(), work, done))

    async def between(self, work: Callable[[], T]) -> T:
        """What `work` gives or raises, run on the thread between two forwards. Never ends once the thread has."""
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[T | Exception] = loop.create_future()
        self._jobs.put(_Job(loop, work, lambda result: None if outcome.done() else outcome.set_result(result)))
        result = await outcome
        if isinstance(result, Exception):
            raise result
        return result

    def stop(self) -> None:
        """End the thread after its last forward; waits for nothing."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.do()
            del job  # what it holds is not kept until the next one comes


@dataclass(frozen=True, slots=True)
class _Job:
    loop: asyncio.AbstractEventLoop
    work: Callable[[], Any]
    done: Callable[[Any], None]

    def do(self) -> None:
        try:
            outcome = self.work()
        except Exception as error:
            outcome = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self.done, outcome)


def run_forward(engine: Engine, chunks: Sequence[Chunk], closing: Sequence[int]) -> list[Result]:
    """Fork and close sessions, run one forward, reduce its rows and draw drafts; results in the order of `chunks`.

    If the engine raises, the sessions of all parts are dropped.
    """
    anew = {chunk.scheduled.item.session for chunk in chunks}.intersection(closing)
    for session in anew:
        engine.close(session)
    try:
        results: list[Result] = [Unshared()] * len(chunks)
        begun = [place for place, chunk in enumerate(chunks) if not chunk.forked or _fork(engine, chunk)]
        for session in closing:  # a session that goes could still be forked from
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
