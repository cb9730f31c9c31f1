"""The choice of chunks, and the thread that runs forwards."""

import asyncio
import threading
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest

from actors.engine.interface import Extend, Outcome
from actors.replica.answers import Answer
from actors.replica.engine_thread import Result, WorkerThread, run_forward
from actors.replica.scheduler import Chunk, ScheduledExtend, choose
from actors.wire.columns import ExtendItem
from actors.wire.messages import Message
from benchmarks.null_engine import NullEngine
from tests.support.deadlines import HANG_S


class Nobody:
    def send(self, *messages: Message) -> None:
        raise AssertionError("no answer is sent here")


def scheduled(tokens: int, rows: int = 1, age: int = 0, done: int = 0, prefix: int = 5) -> ScheduledExtend:
    item = ExtendItem(1, age, age, prefix, 1, 0, list(range(tokens)), rows, 4, np.zeros(0, np.int32))
    return ScheduledExtend(Nobody(), item, done=done)


def taken(chunks: list[Chunk]) -> list[tuple[int, int]]:
    """(age, tokens) of each chunk."""
    return [(chunk.scheduled.item.age, chunk.tokens) for chunk in chunks]


def test_decode_steps_come_first_and_do_not_count_toward_the_budget() -> None:
    chunks = choose([scheduled(100, age=1), scheduled(1, age=9), scheduled(8, rows=8, age=8)], 16)
    assert taken(chunks) == [(9, 1), (8, 8), (1, 16)]


def test_prompts_share_the_budget_by_age() -> None:
    chunks = choose([scheduled(20, age=3), scheduled(10, age=1), scheduled(30, age=2)], 16)
    assert taken(chunks) == [(1, 10), (2, 6)]


def test_the_last_chunk_has_all_tokens_that_give_rows() -> None:
    assert scheduled(40, rows=10).chunk(16).tokens == 16
    assert scheduled(40, rows=10, done=16).chunk(16).tokens == 14
    assert scheduled(40, rows=10, done=30).chunk(16).tokens == 10
    assert scheduled(40, rows=1, done=32).chunk(16).tokens == 8


def test_rows_over_the_budget_run_alone_and_wait_for_older_prompts() -> None:
    assert taken(choose([scheduled(30, rows=30)], 16)) == [(0, 30)]
    assert taken(choose([scheduled(10, age=1), scheduled(30, rows=30, age=2), scheduled(9, age=3)], 16)) == [
        (1, 10),
        (3, 6),
    ]


def test_chunks_add_up_to_the_extend_with_its_prefix_hashes() -> None:
    whole, cut = scheduled(20), scheduled(20)
    whole.advance(12)
    for tokens in (5, 7):
        cut.advance(tokens)
    assert (cut.prefix, cut.done) == (whole.prefix, 12)
    extend = Chunk(cut, cut.left).extend()
    assert (extend.position, list(extend.tokens), extend.rows) == (12, list(range(12, 20)), 1)
    assert Chunk(cut, 3).extend().rows == 0


@pytest.mark.parametrize(("position", "made"), [(9, False), (10, True), (19, True), (20, False)])
def test_a_scheduled_extend_knows_the_rows_that_it_computes(position: int, made: bool) -> None:
    assert scheduled(20, rows=10).makes(position) is made


class Failing(NullEngine):
    """An engine that fails in forwards of more than one extend, and records its threads."""

    def __init__(self) -> None:
        super().__init__(width=32)
        self.threads: set[int] = set()

    def extend(self, batch: Sequence[Extend]) -> list[Outcome]:
        self.threads.add(threading.get_ident())
        if len(batch) > 1:
            raise RuntimeError("out of memory")
        return super().extend(batch)


async def test_forwards_run_in_order_on_one_thread_and_return_on_the_loops() -> None:
    engine, thread = Failing(), WorkerThread("engine")
    outcomes: list[list[Result] | Exception] = []
    back, threads = asyncio.Event(), set()

    def done(outcome: list[Result] | Exception) -> None:
        outcomes.append(outcome)
        threads.add(threading.get_ident())
        if len(outcomes) == 3:
            back.set()

    chunk = Chunk(scheduled(1, prefix=engine.hash_seed), 1)
    thread.start()
    for chunks in ([chunk], [chunk, chunk], []):
        thread.submit(partial(run_forward, engine, chunks, []), done)
    await asyncio.wait_for(back.wait(), HANG_S)
    thread.stop()
    rows, failure, nothing = outcomes
    assert isinstance(rows, list)
    assert isinstance(rows[0], Answer)
    assert isinstance(failure, RuntimeError)
    assert nothing == []
    assert threads == {threading.get_ident()}
    assert len(engine.threads) == 1
    assert engine.threads != threads


async def test_work_between_forwards_runs_on_their_thread_and_can_raise() -> None:
    def wrong() -> None:
        raise AssertionError("an extent is owned twice")

    thread = WorkerThread("engine")
    thread.start()
    assert await thread.call(threading.get_ident) == thread._thread.ident
    with pytest.raises(AssertionError, match="owned twice"):
        await thread.call(wrong)
    thread.stop()
