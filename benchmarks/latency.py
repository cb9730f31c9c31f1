"""Guided decoding over links of different latency, with and without speculation.

    python -m benchmarks.latency [--delays 0 1 10] [--sessions 1 8] [--shape laptop] [--agreement 0.8]
        [--context 32] [--tokens 48] [--threads N] [--rounds 5] [--save]

The coordinator and each model are plain processes on four hosts (`benchmarks.hosts`), and every packet between two of
them is held for the delay: `--delays` are milliseconds one way, so a round trip takes twice that; it is measured too.
A round runs every delay, number of sessions and variant once, in an order that rotates. A rate is a median over the
rounds in tokens per second from request to last token, prompts included; a ratio is the median of the rounds' ratios.
The last line is a list of JSON objects, one for each delay and number of sessions:

delay_ms: one way, as set. round_trip_ms: as measured. guided: with drafts. guided_plain: without. steps_ms: between
forwards of the target without drafts. acceptance: of drafted tokens, null without any.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import uvloop
from rich.table import Table

from actors.api.generation import ROLES
from benchmarks.baselines import Task
from benchmarks.decode import WARM_TOKENS, Plan
from benchmarks.hosts import Host, Network, hosts
from benchmarks.processes import Launch, Worker, launcher
from benchmarks.results_file import arguments, console, progress, publish
from benchmarks.shapes import SHAPES
from benchmarks.tasks import first
from benchmarks.workers import Mode, Served, Service, service

MODES: tuple[Mode, ...] = ("guided", "guided_plain")
PROBES = 15  # round trips that are measured for each delay
CLOSED_PORT = 9


@dataclass(slots=True)
class Point:
    """Results at one delay with one number of sessions."""

    delay_ms: float
    sessions: int
    round_trip_ms: float = 0.0
    rates: dict[Mode, list[float]] = field(default_factory=dict)
    steps_ms: list[float] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0

    def took(self, mode: Mode, served: Served) -> None:
        self.rates.setdefault(mode, []).append(served.decoded.tokens / served.decoded.seconds)
        self.drafted += served.drafted
        self.accepted += served.accepted
        if mode == "guided_plain":
            self.steps_ms.append(served.phases.step_ms)

    def result(self) -> dict[str, Any]:
        """The benchmark's JSON object."""
        guided, plain = (self.rates[mode] for mode in MODES)
        return {
            "delay_ms": self.delay_ms,
            "round_trip_ms": round(self.round_trip_ms, 2),
            "sessions": self.sessions,
            "guided_tps": round(median(guided), 2),
            "guided_plain_tps": round(median(plain), 2),
            "guided_over_plain": round(median(a / b for a, b in zip(guided, plain, strict=True)), 3),
            "steps_ms": round(median(self.steps_ms), 2),
            "acceptance": round(self.accepted / self.drafted, 4) if self.drafted else None,
        }


def on_host(host: Host, factory: Callable[..., Any], *values: Any) -> Any:
    """An object in a process on a host."""
    host.enter()
    return factory(*values, host=host.address)


def spread(launch: Launch, network: Network) -> Launch:
    """Launches each worker on the next host after the first."""
    free = iter(network.hosts[1:])

    async def launch_there(factory: Callable[..., Any], *values: Any) -> Worker:
        return await launch(on_host, next(free), factory, *values)

    return launch_there


def round_trip_ms(host: Host) -> float:
    """Milliseconds until a host refuses a connection: one round trip."""
    times = []
    for _ in range(PROBES):
        began = time.perf_counter()
        with socket.socket() as probe, contextlib.suppress(ConnectionRefusedError):
            probe.connect((host.address, CLOSED_PORT))
        times.append(1_000 * (time.perf_counter() - began))
    return median(times)


async def measure(plan: Plan, delays: Sequence[float], network: Network, done: Callable[[], None]) -> list[Point]:
    """All rounds, from the first host; `done` is called after each point of a round."""
    points = [Point(delay, count) for delay in delays for count in plan.sessions]
    with tempfile.TemporaryDirectory() as folder:
        config = plan.config(Path(folder))
        async with launcher("processes", plan.threads) as launch:
            entered = service(plan.shape, config, plan.agreement, plan.threads, spread(launch, network))
            async with entered as running:
                for count in plan.sessions:
                    for mode in MODES:
                        await running.run(mode, first(plan.tasks(config, count, 0), WARM_TOKENS), plan.temperature)
                for number in range(plan.rounds):
                    turn = number % len(points)
                    for point in points[turn:] + points[:turn]:
                        await _take(point, running, plan.tasks(config, point.sessions, number), network, number)
                        done()
    return points


async def _take(point: Point, running: Service, tasks: Sequence[Task], network: Network, number: int) -> None:
    network.delay(point.delay_ms / 1_000)
    if not point.round_trip_ms:
        point.round_trip_ms = round_trip_ms(network.hosts[1])
    for mode in MODES if number % 2 else MODES[::-1]:
        point.took(mode, await running.run(mode, tasks, 0.0))


def run(plan: Plan, delays: Sequence[float]) -> list[Point]:
    """Measure, on hosts that are removed afterwards. Raises NoHosts."""
    with hosts(1 + len(ROLES)) as network, progress(console()) as bar:
        task = bar.add_task("rounds", total=plan.rounds * len(plan.sessions) * len(delays))
        with network.hosts[0].inside(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
            return loop.run(measure(plan, delays, network, lambda: bar.advance(task)))


def table(points: Sequence[Point]) -> Table:
    """Every figure, by delay and number of sessions."""
    rows = [point.result() for point in points]
    shown = Table(*rows[0], title="guided tokens per second by latency of the link, one way")
    for row in rows:
        shown.add_row(*(str(value) for value in row.values()))
    return shown


def parse() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--delays", type=float, nargs="+", default=[0, 1, 10], help="ms, one way (0 1 10)")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 8], help="decoded together (1 8)")
    parser.add_argument("--shape", choices=SHAPES, default="laptop")
    parser.add_argument("--agreement", type=float, default=0.8, help="of guider and combined choice (0.8)")
    parser.add_argument("--context", type=int, default=32, help="mean tokens of a prompt (32)")
    parser.add_argument("--tokens", type=int, default=48, help="mean tokens of an answer (48)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the target (all cores)")
    parser.add_argument("--rounds", type=int, default=5, help="of every point (5)")
    return parser.parse_args()


def main() -> None:
    options = parse()
    plan = Plan(
        SHAPES[options.shape],
        tuple(options.sessions),
        options.agreement,
        context=options.context,
        tokens=options.tokens,
        threads=options.threads,
        rounds=options.rounds,
    )
    points = run(plan, options.delays)
    console().print(table(points))
    settings = {key: value for key, value in vars(options).items() if key != "save"}
    rates = [{"delay_ms": point.delay_ms, "sessions": point.sessions, "rates": point.rates} for point in points]
    publish(f"latency-{options.shape}", [point.result() for point in points], options.save, [settings, *rates])


if __name__ == "__main__":
    main()
