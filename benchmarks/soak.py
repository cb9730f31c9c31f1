"""Long run with random lengths, clients that leave and kills of every kind; looks for leaks at the end.

    python -m benchmarks.soak [--minutes 20] [--streams 16] [--kills 1] [--cancelled 0.3] [--seed 0] [--save]

The cluster and the streams of benchmarks.faults with two replicas, answers of 8 to 1,000 tokens, a share of the clients
gone at a random time, and `kills` kills a minute of any kind. In the end no stream is open, and every replica must
prove its cache's accounts (free + used = all, every extent owned once) and hold no session. Memory is flat when the
resident set of no deployment of the service grows by more than 1 MB a minute over the second half of the time: the
least-squares slope over all its processes, each with its own level and without its first four minutes (a process that
replaces one that was killed starts anew). Serve's own processes, which keep records of every replica that died, are
shown beside them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from benchmarks.faults import Disturbed, Killer
from benchmarks.kill_harness import DEPLOYMENTS, KINDS, ServedCluster, await_whole, served_cluster, service_config
from benchmarks.results_file import arguments, console, publish
from benchmarks.steady_streams import Case, Streams, cases, requests

CASES = 48
LENGTHS = (8, 1_000)  # tokens of an answer
SAMPLE_S = 5.0
WARM_S = 240.0  # of a process's life that say nothing: its pools and arenas fill in steps of megabytes
FLAT_MB_PER_MIN = 1.0
IDLE_S = 60.0  # after the last stream's end, within which every cache is empty
OWN = (*DEPLOYMENTS, "router")  # processes of this program; the others are Serve's
_PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass(slots=True)
class Memory:
    """Resident sets by process, in MB, each with the time in seconds."""

    samples: dict[tuple[str, int], list[tuple[float, float]]] = field(default_factory=dict)

    def take(self, pids: dict[str, list[int]], now: float) -> None:
        """Sample processes once; those that have just ended are skipped."""
        for kind, of_kind in pids.items():
            for pid in of_kind:
                if (size := resident_mb(pid)) is not None:
                    self.samples.setdefault((kind, pid), []).append((now, size))

    def slopes(self, since: float) -> dict[str, float]:
        """MB a minute by kind from a time on; kinds without a process that lived long enough are left out."""
        slopes = {}
        for kind in sorted({kind for kind, _ in self.samples}):
            parts = [
                _centred(part) for (of, _), all_ in self.samples.items() if of == kind and (part := _late(all_, since))
            ]
            if parts:
                times, sizes = np.concatenate(parts, axis=1)
                slopes[kind] = round(60 * float(times @ sizes) / float(times @ times), 3)
        return slopes


def resident_mb(pid: int) -> float | None:
    """The resident set of a process; None if it has ended."""
    try:
        return int((Path("/proc") / str(pid) / "statm").read_text(encoding="utf-8").split()[1]) * _PAGE_MB
    except OSError:
        return None


def _late(samples: list[tuple[float, float]], since: float) -> list[tuple[float, float]]:
    """Samples from a time on, without the process's first minutes; none if they are too few for a slope."""
    late = [(at, size) for at, size in samples if at >= max(since, samples[0][0] + WARM_S)]
    return late if len(late) > 2 else []


def _centred(samples: list[tuple[float, float]]) -> NDArray[np.float64]:
    """Times and sizes [2, N], each around its mean."""
    both: NDArray[np.float64] = np.array(samples).T
    centred: NDArray[np.float64] = both - both.mean(axis=1, keepdims=True)
    return centred


async def watch(served: ServedCluster, memory: Memory) -> None:
    """Sample until cancelled."""
    while True:
        try:
            actors = await asyncio.to_thread(served.processes)
        except Exception as error:  # Ray's state API is away for a moment
            console().print(f"no sample of memory: {error}")
        else:
            memory.take({kind: [a.pid for a in of_kind] for kind, of_kind in actors.items()}, time.monotonic())
        await asyncio.sleep(SAMPLE_S)


async def kill_now_and_then(killer: Killer, until: float, per_minute: float, draw: random.Random) -> None:
    """Kill at the times of a Poisson process, but not before the service has recovered from the last kill."""
    while (gap := draw.expovariate(per_minute / 60)) < until - time.monotonic():
        await asyncio.sleep(gap)
        await killer.kill(await killer.ready(KINDS))


async def soak(
    served: ServedCluster, asked: list[Case], options: argparse.Namespace, draw: random.Random
) -> tuple[Disturbed, Memory, float]:
    """The disturbed streams, the memory samples, and the time from which the second half counts."""
    began, memory = time.monotonic(), Memory()
    until = began + 60 * options.minutes
    streams = Streams(served.url, asked, options.streams, draw, options.cancelled)
    killer = Killer(served, streams, draw)
    watching = asyncio.create_task(watch(served, memory))
    running = asyncio.create_task(streams.run())
    try:
        await kill_now_and_then(killer, until, options.kills, draw)
        await asyncio.sleep(max(0.0, until - time.monotonic()))
    except TimeoutError as overdue:
        console().print(str(overdue))
    finally:
        streams.stop()
        await running
        watching.cancel()
    return Disturbed(killer.killed, streams.records, streams.refused), memory, (began + until) / 2


def accounts(served: ServedCluster) -> bool:
    """True if every replica proves its cache's accounts and ends with no session."""
    await_whole(served)
    until = time.monotonic() + IDLE_S
    while True:
        try:
            left = served.check_caches()
        except AssertionError as error:
            console().print(f"a cache's accounts are wrong: {error}")
            return False
        if not any(left.values()) or time.monotonic() > until:
            console().print(f"sessions left in each replica: {left}")
            return not any(left.values())
        time.sleep(1)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The benchmark's JSON object."""
    draw = random.Random(options.seed)
    config = service_config(2)
    asked = asyncio.run(cases(config, requests(config.name, CASES, LENGTHS, options.seed)))
    with served_cluster(config) as served:
        disturbed, memory, half = asyncio.run(soak(served, asked, options, draw))
        exact_accounts = accounts(served)
    console().print(*disturbed.failures(), sep="\n")
    slopes = memory.slopes(half)
    console().print(table(memory, slopes))
    result = disturbed.result()
    own = {kind: slope for kind, slope in slopes.items() if kind in OWN}
    return {
        "minutes": options.minutes,
        "requests": len(disturbed.records),
        "cancelled": sum(record.outcome == "cancelled" for record in disturbed.records),
        **{name: result[name] for name in ("kills", "lost", "identical", "refused")},
        "accounting_exact": exact_accounts,
        "memory_flat": set(own) == set(OWN) and max(own.values()) <= FLAT_MB_PER_MIN,
        "rss_slope_mb_per_min": slopes,
    }


def table(memory: Memory, slopes: dict[str, float]) -> Table:
    """Processes of each kind, their largest resident set, and the slope."""
    shown = Table("kind", "processes", "largest, MB", "MB a minute")
    for kind in sorted({kind for kind, _ in memory.samples}):
        sizes = [[size for _, size in samples] for (of, _), samples in memory.samples.items() if of == kind]
        shown.add_row(kind, str(len(sizes)), f"{max(map(max, sizes)):.0f}", str(slopes.get(kind, "too short")))
    return shown


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--minutes", type=float, default=20, help="of streams (20)")
    parser.add_argument("--streams", type=int, default=16, help="at any time (16)")
    parser.add_argument("--kills", type=float, default=1, help="a minute, of any kind (1)")
    parser.add_argument("--cancelled", type=float, default=0.3, help="share of clients that go away (0.3)")
    parser.add_argument("--seed", type=int, default=0, help="of requests, clients and kills (0)")
    options = parser.parse_args()
    publish("soak", run(options), options.save)


if __name__ == "__main__":
    main()
