"""Sessions spread over several coordinators on one trio of models, and the load at which a second one pays.

    python -m benchmarks.coordinators [--shape trio] [--sessions 64] [--coordinators 1 2 4] [--sweep 16 32 64 128 256]
        [--tokens 64] [--rounds 5] [--threads 1] [--save]

Three model processes and each coordinator in one of its own, which makes up the requests of its share itself; no HTTP.
A round runs every number of coordinators once, in an order that rotates, and in the same way one coordinator and two at
each load of the sweep. Rates are medians over the rounds, in tokens a second from request to last token; a ratio is the
median of the rounds' ratios to one coordinator. coordinator_busy: the share of the time that the turns of the busiest
coordinator took. target_busy: that the target's forwards took. Where the target is always busy another coordinator can
gain nothing, and on few cores they contend. pays_from: the least load of the sweep from which on two coordinators are
at least 1.02 times as fast as one; null if there is none.

Shapes h200-32b and h200-7b are a simulation of GPUs (`benchmarks.timed_engine`): models take time and compute nothing,
so that the coordinators have the cores to themselves. An empty `--sweep` measures `--sessions` alone. The last line is
a JSON object.
"""

from __future__ import annotations

import asyncio
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import uvloop
from rich.table import Table

from actors.api.generation import ROLES, Finished
from actors.config import ServiceConfig
from actors.replica.stats import ReplicaStats
from benchmarks.baselines import Task
from benchmarks.exchange import Unfinished
from benchmarks.http_server import CoordinatorWorker
from benchmarks.processes import Launch, ModelWorker, Worker, launcher
from benchmarks.results_file import arguments, console, progress, publish
from benchmarks.shapes import SHAPES, Shape, cache_tokens, service_config
from benchmarks.tasks import first, tasks
from benchmarks.timed_engine import SIMULATION, TIMED_SHAPES
from benchmarks.workers import request
from tests.support.local_service import decode

SESSIONS = 64
COORDINATORS = (1, 2, 4)
SWEEP = (16, 32, 64, 128, 256)
CONTEXT = 32  # mean tokens of a prompt, where prompts are made up
PAYS = 1.02  # over one coordinator: less is noise
WARM_TOKENS = 4


class Share(CoordinatorWorker):
    """A coordinator that decodes its part of the sessions."""

    async def decode(self, tasks: Sequence[Task], first_seed: int) -> int:
        """Decode all of them at once, guided; returns the number of tokens. Raises Unfinished."""
        requests = [request("guided", task, first_seed + number, 0.0) for number, task in enumerate(tasks)]
        answers = await asyncio.gather(*(decode(self._coordinator, each) for each in requests))
        for answer in answers:
            if not isinstance(answer.end, Finished) or answer.end.reason != "length":
                raise Unfinished(f"a session ended otherwise than by its length: {answer.end}")
        return sum(len(answer.tokens) for answer in answers)


@dataclass(frozen=True, slots=True)
class Plan:
    """Parameters of a measurement."""

    shape: Shape
    sessions: int = SESSIONS
    coordinators: tuple[int, ...] = COORDINATORS
    sweep: tuple[int, ...] = SWEEP
    tokens: int = 64
    rounds: int = 5
    threads: int = 1

    @property
    def points(self) -> list[Point]:
        """Loads and numbers of coordinators, each once."""
        wanted = [(self.sessions, count) for count in self.coordinators]
        wanted += [(load, count) for load in self.sweep for count in (1, 2)]
        return [Point(sessions, count) for sessions, count in dict.fromkeys(wanted)]

    def config(self, folder: Path) -> ServiceConfig:
        """Each coordinator may take all sessions, so that its limit of sessions is not what is measured."""
        most = max((self.sessions, *self.sweep))
        cache = cache_tokens(most, 2 * CONTEXT, 2 * self.tokens)
        return service_config(self.shape, folder, cache_tokens=cache, sessions=most, speculate=True)


@dataclass(slots=True)
class Point:
    """A number of sessions and of coordinators, and the rounds' figures."""

    sessions: int
    coordinators: int
    rates: list[float] = field(default_factory=list)
    coordinator_busy: list[float] = field(default_factory=list)
    target_busy: list[float] = field(default_factory=list)

    def over(self, one: Point) -> float:
        """The median of the rounds' ratios."""
        return round(median(rate / alone for rate, alone in zip(self.rates, one.rates, strict=True)), 3)

    def result(self) -> dict[str, Any]:
        """Its figures, but for the ratio."""
        return {
            "sessions": self.sessions,
            "coordinators": self.coordinators,
            "tokens_per_s": round(median(self.rates), 1),
            "coordinator_busy": round(median(self.coordinator_busy), 3),
            "target_busy": round(median(self.target_busy), 3),
        }


@dataclass(frozen=True, slots=True)
class Bench:
    """Running models, and the largest number of coordinators that is measured; idle ones cost nothing."""

    models: list[Worker]
    shares: list[Worker]

    async def run(self, point: Point, work: Sequence[Task], *, keep: bool = True) -> None:
        """Decode `work`, spread evenly."""
        shares = self.shares[: point.coordinators]
        before = await self._busy(shares)
        began = time.perf_counter()
        parts = [work[number :: len(shares)] for number in range(len(shares))]
        asked = (
            share.call("decode", part, 1_000 * at) for at, (share, part) in enumerate(zip(shares, parts, strict=True))
        )
        tokens = sum(await asyncio.gather(*asked))
        seconds = time.perf_counter() - began
        after = await self._busy(shares)
        if keep:
            target, *turns = [(now - then) / seconds for now, then in zip(after, before, strict=True)]
            point.rates.append(tokens / seconds)
            point.target_busy.append(target)
            point.coordinator_busy.append(max(turns))

    async def _busy(self, shares: Sequence[Worker]) -> list[float]:
        """Seconds so far of the target's forwards and of each coordinator's turns."""
        stats: ReplicaStats = await self.models[0].call("stats")
        return [stats.forward_s, *[(await share.call("load")).turns_s for share in shares]]


@asynccontextmanager
async def bench(plan: Plan, config: ServiceConfig, launch: Launch) -> AsyncIterator[Bench]:
    """Models and coordinators, each in a process."""
    secret = secrets.token_bytes(32)
    models = [await launch(ModelWorker, plan.shape, role, 0.8, config, secret, plan.threads) for role in ROLES]
    endpoints = [await worker.call("start") for worker in models]
    most = max(point.coordinators for point in plan.points)
    shares = [await launch(Share, config, secret, endpoints) for _ in range(most)]
    for share in shares:
        await share.call("start")
    yield Bench(models, shares)
    for worker in (*shares, *models):
        await worker.call("stop")


async def measure(plan: Plan, done: Callable[[], None]) -> list[Point]:
    """Measure every point in every round; `done` is called after each."""
    points = plan.points
    with tempfile.TemporaryDirectory() as folder:
        config = plan.config(Path(folder))
        async with launcher("processes", plan.threads) as launch, bench(plan, config, launch) as running:
            for point in points:
                work = tasks(plan.shape, config, point.sessions, CONTEXT, plan.tokens)
                await running.run(point, first(work, WARM_TOKENS), keep=False)
            for number in range(plan.rounds):
                start = number % len(points)
                for point in points[start:] + points[:start]:
                    work = tasks(plan.shape, config, point.sessions, CONTEXT, plan.tokens, number)
                    await running.run(point, work)
                    done()
    return points


def result(plan: Plan, points: Sequence[Point]) -> dict[str, Any]:
    """The benchmark's JSON object."""
    by = {(point.sessions, point.coordinators): point for point in points}

    def figures_of(sessions: int, count: int) -> dict[str, Any]:
        point, one = by[sessions, count], by.get((sessions, 1))
        return point.result() | ({} if one is None else {"over_one": point.over(one)})

    gains = {load: by[load, 2].over(by[load, 1]) for load in sorted(plan.sweep)}
    paying = [load for load in gains if all(gains[later] >= PAYS for later in gains if later >= load)]
    return {
        "shape": plan.shape.name,
        "simulation": plan.shape.simulated,
        "spread": [figures_of(plan.sessions, count) for count in plan.coordinators],
        "sweep": [figures_of(load, count) for load in plan.sweep for count in (1, 2)],
        "pays_from": min(paying, default=None),
    }


def run(plan: Plan) -> list[Point]:
    """Measure, in processes that end afterwards."""
    with progress(console()) as bar, asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
        task = bar.add_task("runs", total=plan.rounds * len(plan.points))
        return loop.run(measure(plan, lambda: bar.advance(task)))


def table(plan: Plan, points: Sequence[Point]) -> Table:
    """Every figure."""
    rows = [point.result() for point in points]
    title = "guided sessions over coordinators" + (f", {SIMULATION}" if plan.shape.simulated else "")
    shown = Table(*rows[0], title=title)
    for row in rows:
        shown.add_row(*map(str, row.values()))
    return shown


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", choices=(*SHAPES, *TIMED_SHAPES), default="trio")
    parser.add_argument("--sessions", type=int, default=SESSIONS, help="spread over the coordinators (64)")
    parser.add_argument("--coordinators", type=int, nargs="+", default=list(COORDINATORS), help="how many (1 2 4)")
    parser.add_argument("--sweep", type=int, nargs="*", default=list(SWEEP), help="sessions over 1 and 2 (16 .. 256)")
    parser.add_argument("--tokens", type=int, default=64, help="mean tokens of an answer, where they are made up (64)")
    parser.add_argument("--rounds", type=int, default=5, help="of everything (5)")
    parser.add_argument("--threads", type=int, default=1, help="of the target; small models get half (1)")
    options = parser.parse_args(argv)
    plan = Plan(
        (SHAPES | TIMED_SHAPES)[options.shape],
        options.sessions,
        tuple(options.coordinators),
        tuple(options.sweep),
        options.tokens,
        options.rounds,
        options.threads,
    )
    points = run(plan)
    console().print(table(plan, points))
    rates = [point.result() | {"rates": [round(rate, 1) for rate in point.rates]} for point in points]
    settings = {key: value for key, value in vars(options).items() if key != "save"}
    publish(f"coordinators-{options.shape}", result(plan, points), options.save, [settings, *rates])


if __name__ == "__main__":
    main()
