"""Rows on a device: they are read on a thread of their own, which waits for the device while others are answered."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from actors.api.generation import Role
from actors.engine.interface import TopKSlices
from actors.replica.engine_thread import Engine
from actors.wire.messages import WHOLE, Refusal
from benchmarks.null_engine import NullRows
from tests.support.coordinators import Answered, Coordinator, No, Reply, StagedEngine, rows_of, stage, within
from tests.support.deadlines import HANG_S
from tests.support.local_service import local_service, trio_config
from tests.support.trio import LONG, chat_prompts, decode_all, request, tokens
from tests.support.watched import watched

GONE = No(Refusal.ROW_GONE)


class SlowRows:
    """Held rows of a slow device."""

    def __init__(self, rows: NullRows, wait: Callable[[], None]) -> None:
        self.inner, self._wait = rows, wait

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def slices(self, k: int, rows: Sequence[int] | None = None) -> TopKSlices:
        self._wait()
        return self.inner.slices(k, rows)


class SlowDevice(StagedEngine):
    """An engine whose reads of rows return once a test lets them, or raise what it says."""

    rows_on_device = True

    def __init__(self, cache_tokens: int = 1_000) -> None:
        super().__init__(cache_tokens)
        self.ready, self.reading = threading.Event(), asyncio.Event()
        self.error: Exception | None = None
        self.found: list[weakref.ref[SlowRows]] = []  # by lookups

    def rows(self, session: int) -> Any:
        held = super().rows(session)
        if held is None:
            return None
        rows = SlowRows(held, self._wait)
        self.found.append(weakref.ref(rows))
        return rows

    def values(self, rows: Sequence[tuple[Any, int]], counts: Sequence[int], ids: NDArray[Any]) -> NDArray[np.float32]:
        self._wait()
        return super().values([(held.inner, row) for held, row in rows], counts, ids)

    def _wait(self) -> None:
        assert threading.current_thread().name == "rows-guider"
        self._loop.call_soon_threadsafe(self.reading.set)
        assert self.ready.wait(HANG_S)
        if self.error is not None:
            error, self.error = self.error, None
            raise error


def look_up(coordinator: Coordinator) -> asyncio.Future[Reply]:
    return coordinator.look_up(1, [1, 2], [9, 3])


def widen(coordinator: Coordinator) -> asyncio.Future[Reply]:
    return coordinator.widen(1, [1, 2], WHOLE)


@pytest.mark.parametrize("read", [look_up, widen])
async def test_others_are_answered_while_the_device_is_waited_for(
    read: Callable[[Coordinator], asyncio.Future[Reply]],
) -> None:
    async with stage(engine=SlowDevice) as s:
        assert isinstance(s.engine, SlowDevice)
        c = await s.coordinator()
        first = await rows_of(c.ask(1, [1, 2], k=WHOLE))
        reply = read(c)
        await asyncio.wait_for(s.engine.reading.wait(), HANG_S)
        await rows_of(c.ask(2, [1]))
        assert await within(c.look_up(3, [1], [5])) == GONE
        assert not reply.done()
        s.engine.ready.set()
        answer = await within(reply)
        if isinstance(answer, Answered):
            assert answer.logits.tolist() == first.logits.tolist()
        else:
            assert answer == first.logits[0, [9, 3]].tolist()


async def test_lookups_that_waited_for_their_row_are_read_beside_the_next_forward() -> None:
    async with stage(engine=SlowDevice) as s:
        assert isinstance(s.engine, SlowDevice)
        c = await s.coordinator()
        with s.engine.held():
            computed = c.ask(1, [1, 2], k=WHOLE)
            await s.engine.entered()
            lookup = look_up(c)
            await c.received()
        first = await rows_of(computed)
        await asyncio.wait_for(s.engine.reading.wait(), HANG_S)
        await rows_of(c.ask(1, [3], before=[1, 2]))
        assert not lookup.done()
        s.engine.ready.set()
        assert await within(lookup) == first.logits[0, [9, 3]].tolist()


async def test_a_device_that_is_late_refuses_its_lookups_and_keeps_their_rows() -> None:
    async with stage(engine=SlowDevice, row_wait_s=0.0) as s:
        assert isinstance(s.engine, SlowDevice)
        c = await s.coordinator()
        await rows_of(c.ask(1, [1, 2]))
        assert await within(look_up(c)) == GONE
        c.release(1)
        await rows_of(c.ask(2, [1]))
        (late,) = s.engine.found
        assert late() is not None, "the device still reads them"
        s.engine.ready.set()
        async with asyncio.timeout(HANG_S):
            while late() is not None:
                await c.received()


async def test_rows_that_cannot_be_read_refuse_their_own_lookups_alone(caplog: pytest.LogCaptureFixture) -> None:
    async with stage(engine=SlowDevice) as s:
        assert isinstance(s.engine, SlowDevice)
        c = await s.coordinator()
        first = await rows_of(c.ask(1, [1, 2], k=WHOLE))
        s.engine.ready.set()
        s.engine.error = RuntimeError("out of memory")
        assert await within(look_up(c)) == GONE
        assert await within(look_up(c)) == first.logits[0, [9, 3]].tolist()
    assert "1 lookups are refused, their rows were not read in 10.0 s: RuntimeError('out of memory')" in caplog.text


async def test_rows_read_on_a_thread_change_no_token(trio_engines: Mapping[Role, Engine]) -> None:
    config = trio_config(exchange={"k": 4}, coordinator={"max_sessions": 8})
    with watched(trio_engines) as trio:
        answers, lookups = [], []
        for on_device in (False, True):
            for engine in trio.watched.values():
                engine.rows_on_device = on_device
            async with local_service(config, trio.engines) as service:
                sampling = replace(LONG, max_tokens=20)
                requests = [
                    request(service.tokenizers, text, sampling=sampling, seed=seed)
                    for seed, text in enumerate(chat_prompts(4, 2))
                ]
                answers.append(tokens(await decode_all(service.coordinators[0], requests)))
                lookups.append(sum(replica.stats().lookups for replica in service.replicas.values()))
        assert answers[0] == answers[1]
        assert min(lookups) > 0
