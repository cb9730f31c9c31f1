"""Measures a decoding step's time when the models compute nothing.

    python -m benchmarks.exchange [--rounds 5] [--width 152064] [--save]

Three model replicas in three Ray actors, with a few rows of 152,064 logits each, and a coordinator in this process:
what remains is the exchange. A step is the time from one token of a session to its next, while every session decodes.
In between, and in the same actors, three plain async actor calls with 16 KB replies are timed, all three together.
coordinator_us_per_token is CPU time of the coordinator's thread, readers of the answers included. The last line is a
JSON list with one object for each number of sessions.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
import uvloop
from ray.actor import ActorHandle
from rich.table import Table

from actors.api.generation import ROLES, Finished, Role
from actors.config import ServiceConfig
from actors.coordinator.coordinator import Coordinator
from actors.directory import Endpoint
from actors.replica.process import collect_rarely
from actors.replica.replica import ModelReplica, ReplicaSettings
from actors.replica.stats import ReplicaStats
from actors.text.tokenizer import RoleTokenizer, TextStream
from benchmarks.null_engine import PUBLISHED_WIDTH
from benchmarks.results_file import arguments, console, progress, publish
from benchmarks.synthetic_models import guided_request, wide_config
from benchmarks.synthetic_rows import Tail, TailEngine, TailStream
from tests.support.local_service import decode

SESSIONS = (1, 64)
STEPS = {1: 400, 64: 60}  # of each session in a round
CALLS = 200  # fanned out to all models, in a round
REPLY_BYTES = 16 << 10
SETTLED = 10  # tokens of a session before its steps count
CONNECT_S = 60.0
TAIL, CYCLE = Tail(2.2), 8  # what the rows are like, and how many there are
TEMPERATURE = 0.6


class Unfinished(RuntimeError):
    """A session did not finish; the message is the coordinator's."""


class NullModel:
    """A Ray actor: one replica of a model that computes nothing, and a plain method for comparison."""

    def __init__(self, role: Role, width: int, secret: bytes) -> None:
        self._role, self._incarnation = role, secrets.token_hex(8)
        engine = TailEngine(TailStream(TAIL, width, cycle=CYCLE), role)
        settings = ReplicaSettings(max_position=1 << 20, prefill_chunk=2_048, row_wait_s=30.0, forward_timeout_s=120.0)
        self._replica = ModelReplica(engine, role, self._incarnation, secret, settings)

    async def start(self) -> Endpoint:
        """Listen on the loopback interface."""
        collect_rarely()
        host, port = await self._replica.start()
        return Endpoint(self._role, host, port, self._incarnation)

    async def stop(self) -> None:
        """Close every connection."""
        await self._replica.stop()

    async def stats(self) -> ReplicaStats:
        """Totals since the start."""
        return self._replica.stats()

    async def call(self) -> bytes:
        """A reply as long as a step's."""
        return bytes(REPLY_BYTES)


class StampedText(TextStream):
    """Records the time of each token."""

    def __init__(self, tokenizer: StampedTokenizer, after: Sequence[int]) -> None:
        super().__init__(tokenizer, after)
        self.times: list[float] = []
        tokenizer.texts.append(self)

    def push(self, id_: int) -> str:
        self.times.append(time.perf_counter())
        return super().push(id_)


class StampedTokenizer(RoleTokenizer):
    """A tokenizer whose streams record the time of each token."""

    texts: list[StampedText]

    def stream(self, after: Sequence[int] = (), skip_special: bool = True, shown: Collection[int] = ()) -> TextStream:
        return StampedText(self, after)


@dataclass(slots=True)
class Timings:
    """Seconds of steps and of fanned-out calls; the bytes, and the coordinator's CPU seconds, of `tokens` tokens."""

    sessions: int
    steps: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)
    bytes: int = 0
    cpu_s: float = 0.0
    tokens: int = 0

    def result(self) -> dict[str, Any]:
        """The benchmark's JSON object."""
        return {
            "sessions": self.sessions,
            "step_ms_p50": _ms(self.steps, 0.5),
            "step_ms_p99": _ms(self.steps, 0.99),
            "ray_actor_call_ms_p50": _ms(self.calls, 0.5),
            "step_over_ray_call": round(_ms(self.steps, 0.5) / _ms(self.calls, 0.5), 3),
            "coordinator_us_per_token": round(1e6 * self.cpu_s / self.tokens, 1),
            "bytes_per_token": round(self.bytes / self.tokens),
        }


@dataclass(frozen=True, slots=True)
class Bench:
    """Three models, and a coordinator that is connected to them."""

    coordinator: Coordinator
    tokenizer: StampedTokenizer
    stats: Callable[[], Any]  # an awaitable of every replica's ReplicaStats
    call: Callable[[], Any]  # an awaitable of one call fanned out to every model

    async def round(self, timings: Timings, steps: int, calls: int) -> None:
        """Decode `steps` tokens in every session, then call."""
        before = _bytes(await self.stats())
        self.tokenizer.texts = []
        requests = [guided_request(str(n), [1 + n], steps, TEMPERATURE) for n in range(timings.sessions)]
        cpu_s = time.thread_time()
        for answer in await asyncio.gather(*(decode(self.coordinator, request) for request in requests)):
            if not isinstance(answer.end, Finished) or answer.end.reason != "length":
                raise Unfinished(f"a session ended otherwise than by its length: {answer.end}")
        timings.cpu_s += time.thread_time() - cpu_s
        timings.bytes += _bytes(await self.stats()) - before
        timings.tokens += steps * timings.sessions
        for text in self.tokenizer.texts:
            timings.steps += np.diff(text.times[SETTLED:]).tolist()
        for _ in range(calls):
            began = time.perf_counter()
            await self.call()
            timings.calls.append(time.perf_counter() - began)


async def measure(folder: Path, width: int, rounds: int, done: Callable[[], None]) -> list[Timings]:
    """Start three actors and a coordinator, and take `rounds` rounds of each number of sessions in turn."""
    secret = secrets.token_bytes(32)
    actor = ray.remote(num_cpus=0)(NullModel)
    models: list[ActorHandle[Any]] = [actor.remote(role, width, secret) for role in ROLES]
    endpoints = await asyncio.gather(*(model.start.remote() for model in models))

    async def locate() -> Sequence[Endpoint]:
        return endpoints

    config = null_config(folder, width)
    tokenizer = StampedTokenizer.load(str(folder))
    assert isinstance(tokenizer, StampedTokenizer)
    coordinator = Coordinator(config, dict.fromkeys(ROLES, tokenizer), secret, locate)
    await coordinator.start()
    collect_rarely()
    try:
        await connected(coordinator)
        bench = Bench(
            coordinator,
            tokenizer,
            lambda: asyncio.gather(*(model.stats.remote() for model in models)),
            lambda: asyncio.gather(*(model.call.remote() for model in models)),
        )
        results = [Timings(sessions) for sessions in SESSIONS]
        for timings in results:  # what is slow once is not measured
            await bench.round(Timings(timings.sessions), SETTLED + 2, SETTLED)
        for _ in range(rounds):
            for timings in results:
                await bench.round(timings, STEPS[timings.sessions], CALLS)
                done()
        return results
    finally:
        await coordinator.stop()
        await asyncio.gather(*(model.stop.remote() for model in models))


def null_config(folder: Path, width: int) -> ServiceConfig:
    """Nothing is drafted, widened or audited: every step is the same exchange."""
    exchange = {"max_unseen_mass": 1, "audit_every": 0}
    return wide_config(folder, width, exchange=exchange, speculation={"drafts": 0})


async def connected(coordinator: Coordinator) -> None:
    """Wait until every role is connected. Raises TimeoutError."""
    async with asyncio.timeout(CONNECT_S):
        while coordinator.missing_roles():  # noqa: ASYNC110  # a coordinator has no event for it
            await asyncio.sleep(0.01)


def table(results: Sequence[Timings]) -> Table:
    """Every figure, by number of sessions."""
    rows = [timings.result() for timings in results]
    shown = Table(*rows[0], title="one step, and three plain actor calls")
    for row in rows:
        shown.add_row(*(f"{value:,}" for value in row.values()))
    return shown


def run(width: int, rounds: int) -> list[Timings]:
    """Measure, in a Ray cluster that ends afterwards."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        "local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 << 20,
        _node_ip_address="127.0.0.1",
    )
    try:
        with tempfile.TemporaryDirectory() as folder, progress(console()) as bar:
            task = bar.add_task("rounds", total=rounds * len(SESSIONS))
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:  # the loop that Ray gives its workers
                return loop.run(measure(Path(folder), width, rounds, lambda: bar.advance(task)))
    finally:
        ray.shutdown()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of each number of sessions (5)")
    parser.add_argument("--width", type=int, default=PUBLISHED_WIDTH, help=f"logits in a row ({PUBLISHED_WIDTH})")
    options = parser.parse_args()
    results = run(options.width, options.rounds)
    console().print(table(results))
    publish("exchange", [timings.result() for timings in results], options.save)


def _bytes(stats: Sequence[ReplicaStats]) -> int:
    return sum(each.bytes_received + each.bytes_sent for each in stats)


def _ms(seconds: Sequence[float], quantile: float) -> float:
    return round(1_000 * float(np.quantile(seconds, quantile)), 3)


if __name__ == "__main__":
    main()
