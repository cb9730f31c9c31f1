"""A coordinator that a test drives, and an engine that a test can stop, fail and inspect."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actors.decoding.hashing import extend_hashes
from actors.engine.interface import Extend as EngineExtend
from actors.engine.interface import Outcome
from actors.replica.replica import ModelReplica, ReplicaSettings
from actors.wire.client import Connection
from actors.wire.columns import drafted_items, pack_lookups, rows_ids
from actors.wire.link import Limits
from actors.wire.messages import (
    DRAFT_ITEM,
    EXTEND_ITEM,
    LOOKUP_ITEM,
    WHOLE,
    WIDEN_ITEM,
    Drafted,
    Extend,
    Message,
    Refusal,
    Refused,
    Rows,
    Values,
    Widen,
)
from benchmarks.null_engine import NullEngine
from tests.support.deadlines import HANG_S

SECRET = b"a secret of the whole application"
WIDTH = 64


class StagedEngine(NullEngine):
    """An engine that records its forwards as {session: tokens}, and waits before a forward while a test holds it."""

    def __init__(self, cache_tokens: int = 1_000) -> None:
        super().__init__(WIDTH, "guider", cache_tokens)
        self.batches: list[dict[int, int]] = []
        self.closed: list[int] = []
        self.failure: Exception | None = None
        self._gate = threading.Event()
        self._gate.set()
        self._loop = asyncio.get_running_loop()
        self._entered = asyncio.Event()

    def extend(self, batch: Sequence[EngineExtend]) -> list[Outcome]:
        self.batches.append({extend.session: len(extend.tokens) for extend in batch})
        gate = self._gate
        self._loop.call_soon_threadsafe(self._entered.set)
        assert gate.wait(10)
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        return super().extend(batch)

    def close(self, session: int) -> None:
        super().close(session)
        self.closed.append(session)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold forwards that begin in this context until its end."""
        self._entered.clear()
        gate = self._gate = threading.Event()
        try:
            yield
        finally:
            gate.set()

    async def entered(self) -> None:
        """Wait until a forward has begun and is held."""
        await asyncio.wait_for(self._entered.wait(), HANG_S)


@dataclass(frozen=True, slots=True)
class Answered:
    """The rows of one item."""

    logsumexp: list[float]
    tempered: list[float]
    ids: NDArray[np.int32]  # [R, k]
    logits: NDArray[np.float32]  # [R, k] or [R, width]
    required: NDArray[np.float32]  # [R, know]


@dataclass(frozen=True, slots=True)
class No:
    """A refusal."""

    code: Refusal
    detail: int = 0


Reply = Answered | No | list[float]


class Coordinator:
    """One connection to a replica, with its replies by call id."""

    def __init__(self, engine: NullEngine) -> None:
        self._engine = engine
        self._calls = itertools.count(1)
        self._replies: dict[int, asyncio.Future[Reply]] = {}
        self.drafted: dict[int, list[int]] = {}  # by call id
        self.frames: list[Message] = []
        self.ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.connection: Connection

    def hash_of(self, tokens: Sequence[int]) -> int:
        """The running hash of these tokens."""
        return extend_hashes(self._engine.hash_seed, tokens)[-1] if tokens else self._engine.hash_seed

    def ask(
        self,
        session: int,
        tokens: Sequence[int],
        *,
        before: Sequence[int] = (),
        rows: int = 1,
        k: int = 4,
        required_ids: Sequence[int] = (),
        epoch: int = 1,
        age: int = 0,
        call_id: int | None = None,
        draft: tuple[int, int, int, float, float] | None = None,
        temperature: float = 1.0,
    ) -> asyncio.Future[Reply]:
        """Extend a session that holds the tokens `before`. draft: drafts, seed, position, temperature and top_p."""
        call_id, reply = self._expect(call_id)
        prefix = self.hash_of(before)
        item = (
            call_id,
            session,
            age,
            prefix,
            epoch,
            len(before),
            len(tokens),
            rows,
            k,
            len(required_ids),
            0,
            temperature,
        )
        drafting = np.array([] if draft is None else [(0, *draft)], DRAFT_ITEM)
        items = np.array([item], EXTEND_ITEM)
        self.connection.send(Extend(items, np.array(tokens), np.array(required_ids), drafting=drafting))
        return reply

    def look_up(
        self, session: int, tokens: Sequence[int], ids: Sequence[int], *, epoch: int = 1
    ) -> asyncio.Future[Reply]:
        """Look up the row of the last of all the session's `tokens`."""
        call_id, reply = self._expect()
        item = (call_id, session, self.hash_of(tokens), epoch, len(tokens) - 1, len(ids))
        self.connection.send(pack_lookups(np.array([item], LOOKUP_ITEM), np.array(ids, np.int64), WIDTH))
        return reply

    def widen(self, session: int, tokens: Sequence[int], k: int) -> asyncio.Future[Reply]:
        """Widen the row of the last of all the session's `tokens`."""
        call_id, reply = self._expect()
        item = (call_id, session, self.hash_of(tokens), 1, len(tokens) - 1, k)
        self.connection.send(Widen(np.array([item], WIDEN_ITEM)))
        return reply

    def release(self, *sessions: int) -> None:
        self.connection.send(Extend(released=np.array(sessions, np.uint64)))

    async def received(self) -> None:
        """Wait until the replica has read everything sent so far: it answers a lookup of no session at once."""
        assert await self.look_up(0, [1], []) == No(Refusal.ROW_GONE)

    def _expect(self, call_id: int | None = None) -> tuple[int, asyncio.Future[Reply]]:
        call_id = next(self._calls) if call_id is None else call_id
        self._replies[call_id] = asyncio.get_running_loop().create_future()
        return call_id, self._replies[call_id]

    def on_message(self, message: Message) -> None:
        self.frames.append(message)
        match message:
            case Rows():
                self._take_rows(message)
            case Drafted():
                self.drafted.update(drafted_items(message))
            case Values():
                first = 0
                for call_id, count in message.items.tolist():
                    self._replies.pop(call_id).set_result(message.values[first : first + count].tolist())
                    first += count
            case Refused():
                for call_id, code, detail in message.items.tolist():
                    self._replies.pop(call_id).set_result(No(Refusal(code), detail))

    def _take_rows(self, message: Rows) -> None:
        ids = rows_ids(message, WIDTH)
        row = slot = value = required = 0
        for call_id, rows, k, required_ids in message.items.tolist():
            slots, values = (0, WIDTH) if k == WHOLE else (k, k)
            answer = Answered(
                message.logsumexp[row : row + rows].tolist(),
                message.tempered[row : row + rows].tolist(),
                ids[slot : slot + rows * slots].reshape(rows, slots),
                message.logits[value : value + rows * values].reshape(rows, values),
                message.required[required : required + rows * required_ids].reshape(rows, required_ids),
            )
            row, slot, value, required = (
                row + rows,
                slot + rows * slots,
                value + rows * values,
                required + rows * required_ids,
            )
            self._replies.pop(call_id).set_result(answer)
        assert (row, slot, value, required) == tuple(
            len(part) for part in (message.logsumexp, ids, message.logits, message.required)
        )


@dataclass
class Stage:
    """A replica with a staged engine, and any number of coordinators."""

    engine: StagedEngine
    replica: ModelReplica
    host: str
    port: int

    async def coordinator(self, name: str = "c") -> Coordinator:
        coordinator = Coordinator(self.engine)
        coordinator.connection = await Connection.open(
            self.host,
            self.port,
            SECRET,
            incarnation="g-1",
            peer=name,
            on_message=coordinator.on_message,
            on_closed=coordinator.ended.set_result,
        )
        return coordinator


@asynccontextmanager
async def stage(
    *,
    cache_tokens: int = 1_000,
    prefill_chunk: int = 16,
    max_position: int = 500,
    row_wait_s: float = 10.0,
    forward_timeout_s: float = 60.0,
    limits: Limits | None = None,
    engine: type[StagedEngine] = StagedEngine,
) -> AsyncIterator[Stage]:
    """A running replica without a batching delay."""
    staged = engine(cache_tokens)
    settings = ReplicaSettings(
        max_position,
        prefill_chunk,
        batching_delay_share=0.0,
        row_wait_s=row_wait_s,
        forward_timeout_s=forward_timeout_s,
    )
    replica = ModelReplica(staged, "guider", "g-1", SECRET, settings, limits=limits or Limits(farewell_s=0.2))
    host, port = await replica.start()
    try:
        yield Stage(staged, replica, host, port)
    finally:
        await replica.stop()


async def within(reply: asyncio.Future[Reply]) -> Reply:
    """Wait for a reply. Raises TimeoutError after HANG_S, so that a test fails instead of hanging."""
    return await asyncio.wait_for(reply, HANG_S)


async def rows_of(reply: asyncio.Future[Reply]) -> Answered:
    """Wait for a reply and check that it is rows."""
    answer = await within(reply)
    assert isinstance(answer, Answered), answer
    return answer
