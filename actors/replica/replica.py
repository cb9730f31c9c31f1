"""One replica of a model role: a loop that batches the extends of all coordinators into forwards.

    wait for extends -> choose chunks -> forward -> answer

Plain asyncio around one engine, without Ray and torch. Forwards run on the engine's own thread, and reads of rows that
wait for a device on another. Meanwhile the event loop's thread reads frames, answers lookups of rows in the host's
memory and checks who owns a session. The loop consists of callbacks, each of which calls the next: with small models,
tasks and futures would take longer than the forward.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from actors.engine.errors import EngineError
from actors.engine.interface import Engine, Full, Held, KVMiss
from actors.metrics import Recorder
from actors.replica.answers import Answer, Drafter
from actors.replica.batching_delay import BatchingDelay
from actors.replica.engine_thread import Failed, Result, Unshared, WorkerThread, run_forward
from actors.replica.leases import Lease, SessionLeases
from actors.replica.lookups import LookupService
from actors.replica.scheduler import Chunk, ScheduledExtend, choose
from actors.replica.stats import ReplicaLoad, ReplicaMeter, ReplicaStats
from actors.replica.validation import ExtendValidator
from actors.warmup import compile_kernels
from actors.wire.columns import ExtendItem, extend_items
from actors.wire.link import Limits, cancel
from actors.wire.messages import Extend, Lookup, Message, ProtocolError, Refusal, Welcome, Widen
from actors.wire.replies import Replies
from actors.wire.server import Peer, Server

log = logging.getLogger(__name__)

_FAREWELL_S = 1.0  # how long `stop` waits for a running forward
_ENVELOPE = 1 << 10  # most bytes of a frame beside its columns


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """Limits of a replica, in seconds and tokens."""

    max_position: int  # most tokens of one session
    prefill_chunk: int  # most prompt tokens in one forward
    row_wait_s: float  # longest wait of a lookup for its row
    forward_timeout_s: float  # a longer forward makes the replica unhealthy
    batching_delay_share: float = 0.5  # see BatchingDelay
    batching_delay_cap_s: float = 0.01


class ReplicaUnhealthy(RuntimeError):
    """The replica cannot continue and must be replaced."""


class ModelReplica:
    """Serves one engine to any number of coordinators. Call `start` once, then `stop` once."""

    def __init__(
        self,
        engine: Engine,
        role: str,
        incarnation: str,
        secret: bytes,
        settings: ReplicaSettings,
        *,
        host: str = "127.0.0.1",
        tls: ssl.SSLContext | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._host = host
        limits = limits or Limits()
        answer_limit = limits.frame - _ENVELOPE
        welcome = Welcome(
            role=role,
            incarnation=incarnation,
            width=engine.width,
            hash_seed=engine.hash_seed,
            cache_tokens=engine.cache_stats().tokens_total,
            max_position=settings.max_position,
            batch_invariant=engine.batch_invariant,
            devices=" ".join(engine.devices),
        )
        self._server = Server(secret, welcome, self._on_message, self._on_closed, tls=tls, limits=limits)
        self._thread = WorkerThread(f"engine-{role}")
        self._reader = WorkerThread(f"rows-{role}") if engine.rows_on_device else None
        self._batching_delay = BatchingDelay(settings.batching_delay_share, settings.batching_delay_cap_s)
        self._leases = SessionLeases()
        self._validator = ExtendValidator(engine.width, settings.max_position, answer_limit)
        self._replies = Replies(answer_limit, engine.width)
        self._drafter = Drafter(engine, self._replies, settings.max_position)
        self._lookups = LookupService(engine, self._leases, self._replies, settings.row_wait_s, self._reader)
        self._closing: set[int] = set()  # sessions whose cache is freed by the next forward
        self._next_turn: asyncio.Handle | None = None  # the scheduled turn of the loop
        self._waiting_since: float | None = None  # when the first extend of the next forward arrived
        self._forward_began: float | None = None
        self._over = False
        self._failure: Exception | None = None  # the error that ended the loop
        self._closing_server: asyncio.Task[None] | None = None
        self._meter = ReplicaMeter(role)

    async def start(self) -> tuple[str, int]:
        """Compile the kernels, listen, and work. Returns (host, port) for coordinators. Raises UnsupportedProcessor."""
        await asyncio.to_thread(compile_kernels)
        self._thread.start()
        if self._reader is not None:
            self._reader.start()
        return self._host, await self._server.start(self._host)

    async def stop(self) -> None:
        """Close all connections, all sessions' caches and the threads. A forward that hangs is abandoned."""
        self._over = True
        cancel(self._next_turn)
        self._lookups.close()
        await self._server.close()
        closed = asyncio.Event()
        self._thread.submit(partial(run_forward, self._engine, (), list(self._closing)), lambda outcome: closed.set())
        self._thread.stop()
        if self._reader is not None:
            self._reader.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL_S):
                await closed.wait()

    def load(self) -> ReplicaLoad:
        """The current load."""
        cache = self._engine.cache_stats()
        return ReplicaLoad(
            len(self._leases),
            self._leases.waiting,
            cache.tokens_total,
            cache.tokens_used,
            self._batching_delay.forward_s,
        )

    def stats(self) -> ReplicaStats:
        """Totals since the start."""
        return self._meter.stats(self._lookups, self._server)

    def measured(self) -> Recorder:
        """The metrics, as of now."""
        return self._meter.report(self.load())

    async def check_cache(self) -> int:
        """Check the cache's invariants between two forwards. Returns its number of sessions; raises AssertionError."""
        await self._thread.call(self._engine.check)
        return self._engine.cache_stats().sessions

    def check_health(self) -> None:
        """Raise ReplicaUnhealthy if the loop has ended or a forward hangs."""
        if self._failure is not None:
            raise ReplicaUnhealthy(f"the replica's loop has ended: {self._failure!r}") from self._failure
        if (
            self._forward_began is not None
            and time.monotonic() - self._forward_began > self._settings.forward_timeout_s
        ):
            raise ReplicaUnhealthy(f"a forward has been running for more than {self._settings.forward_timeout_s} s")

    # -- the loop

    def _wake(self) -> None:
        """Schedule a turn after all data that has arrived is read. A running forward takes the next turn at its end."""
        if self._forward_began is None and not self._over:
            cancel(self._next_turn)
            self._next_turn = asyncio.get_running_loop().call_soon(self._guarded, self._turn)

    def _guarded(self, step: Callable[[], None]) -> None:
        """Run a step of the loop. An error ends the loop and closes all connections."""
        if self._over:
            return
        try:
            step()
        except Exception as error:
            log.exception("the replica's loop has ended; its connections are closed")
            self._over, self._failure = True, error
            self._closing_server = asyncio.get_running_loop().create_task(self._server.close())

    def _turn(self) -> None:
        """Run a forward if there is work and no further extend is worth waiting for."""
        assert self._forward_began is None
        if self._leases.idle and not self._closing:
            return
        now = time.monotonic()
        if self._waiting_since is None:
            self._waiting_since = now
        until = self._batching_delay.wait_until(self._waiting_since, now)
        if until is not None:
            self._next_turn = asyncio.get_running_loop().call_later(until - now, self._guarded, self._turn)
            return
        self._waiting_since, self._forward_began = None, now
        chunks, closing, self._closing = self._choose(), list(self._closing), set()
        self._thread.submit(
            partial(run_forward, self._engine, chunks, closing),
            lambda outcome: self._guarded(partial(self._forwarded, chunks, outcome)),
        )

    def _forwarded(self, chunks: Sequence[Chunk], outcome: Sequence[Result] | Exception) -> None:
        """Handle the end of a forward: count it, answer it, take the next turn."""
        assert self._forward_began is not None
        took, self._forward_began = time.monotonic() - self._forward_began, None
        if isinstance(outcome, Exception):
            log.error("a forward over %d sessions failed", len(chunks), exc_info=outcome)
            self._meter.failed()
            outcome = [Failed()] * len(chunks)
        done = [p for p, r in zip(chunks, outcome, strict=True) if isinstance(r, (Answer, Held))]
        packed = self._count(done, took) if chunks else 0
        concluded = [self._conclude(chunk, result) for chunk, result in zip(chunks, outcome, strict=True)]
        self._lookups.settle(each for each in concluded if each is not None)
        self._answer(packed, took)
        self._turn()

    def _choose(self) -> list[Chunk]:
        # No forward runs now, so this thread may call the engine.
        return choose(self._leases.heads(), self._settings.prefill_chunk, self._engine.shared)

    def _count(self, chunks: Sequence[Chunk], took: float) -> int:
        """Record a forward's duration. Returns the tokens that went through it."""
        self._batching_delay.forward_took(took)
        return self._meter.forward(chunks, took)

    def _conclude(self, chunk: Chunk, result: Result) -> tuple[Lease, Refusal] | None:
        """Answer a chunk whose forward is over, unless its session was released or taken over meanwhile.

        Returns (lease, code for lookups whose row is missing), or None if no row can be new.
        """
        scheduled = chunk.scheduled
        lease = self._leases.running(scheduled)
        if lease is None:
            return None
        peer, call_id, refusal = scheduled.peer, scheduled.item.call_id, Refusal.ROW_GONE
        if chunk.forked and isinstance(result, Held | Answer):
            self._replies.forked(peer, call_id, chunk.forked)
        match result:
            case Held():
                scheduled.advance(chunk.taken)
                self._replies.progressed(peer)  # else a long prompt would be taken for a hang
                return None
            case Unshared():
                scheduled.blocks = ()
                return None
            case Answer() if scheduled.item.draft is None:
                self._replies.rows(peer, result.answered, result.place)
            case Answer() if self._drafter.continues(scheduled, chunk.taken, result, alone=len(lease.queue) == 1):
                return lease, refusal
            case Answer():
                self._drafter.finish(scheduled)
            case KVMiss() | Full() if self._drafter.stop_drafting(scheduled):
                pass  # answered with the drafts before this one
            case KVMiss():
                self._replies.refuse(peer, call_id, Refusal.KV_MISS, result.held)
            case Full():
                self._replies.refuse(peer, call_id, Refusal.FULL, self._retry_ms())
            case Failed():
                refusal = Refusal.FAILED
                self._replies.refuse(peer, call_id, refusal)
        lease.queue.popleft()
        return lease, refusal

    def _retry_ms(self) -> int:
        """Milliseconds after which a retry may succeed: four forwards, within 5 ms to 1 s."""
        return round(min(max(4_000 * self._batching_delay.forward_s, 5), 1_000))

    def _answer(self, packed: int, took: float) -> None:
        """Send the answers of a forward over `packed` tokens, which took so many seconds."""
        now = time.monotonic()
        for recipient in self._replies.flush(packed, round(took * 1e6)):
            self._batching_delay.answered(recipient, now)

    # -- requests of coordinators

    def _on_message(self, peer: Peer, message: Message) -> None:
        match message:
            case Extend():
                self._on_extend(peer, message)
            case Lookup():
                began = time.perf_counter()
                self._lookups.look_up(peer, message)
                self._meter.looked_up(time.perf_counter() - began)
            case Widen():
                self._lookups.widen(peer, message)
            case _:
                raise ProtocolError(f"a model does not take {type(message).__name__}")

    def _on_extend(self, peer: Peer, message: Extend) -> None:
        items = extend_items(message)
        for session in message.released.tolist():
            if self._leases.release(peer, session, self._replies):
                self._closing.add(session)
        invalid = self._validator.invalid(message, items)
        for place, item in enumerate(items):
            lease = self._leases.claim(peer, item, self._replies)
            if lease is not None:
                self._admit(peer, item, lease, invalid.get(place))
        self._replies.flush()
        if self._leases.owns_any(peer):
            self._batching_delay.arrived(peer, time.monotonic())
        else:
            self._batching_delay.forget(peer)
        self._wake()

    def _admit(self, peer: Peer, item: ExtendItem, lease: Lease, invalid: str | None) -> None:
        """Queue an item, or refuse it if it can never succeed. invalid: the reason, beside those of the engine."""
        if invalid is None:
            scheduled = ScheduledExtend(peer, item)
            try:
                self._engine.check_extend(scheduled.extend)
            except EngineError as error:
                invalid = str(error)
            else:
                lease.queue.append(scheduled)
                return
        log.warning("an item of %s is refused: %s", peer.name, invalid)
        self._replies.refuse(peer, item.call_id, Refusal.BAD_ITEM)

    def _on_closed(self, peer: Peer) -> None:
        self._closing.update(self._leases.release_all(peer, self._replies))
        self._replies.flush()
        self._batching_delay.forget(peer)
        self._meter.disconnected(peer)
        self._wake()
