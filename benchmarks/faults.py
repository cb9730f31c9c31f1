"""Kills every kind of process in mid-stream; counts lost and differing streams and measures how long they are silent.

    python -m benchmarks.faults [--rounds 20] [--replicas 1|2] [--streams 16] [--tokens 400 1000] [--seed 0] [--save]

Three nodes on this machine, `batch_invariant` (benchmarks.kill_harness), `streams` streams over HTTP at any time, each
compared with the answer of an undisturbed service. Every kind of process is killed `rounds` times by SIGKILL at random
times: three quarters of them where two replicas of each model and of the coordinator live, the others where there is
one (or all as --replicas says). A kind is killed only when all its processes serve, and none while a stream is
silent; kills of different kinds fall into one another's recovery.

Recovery is the time from a kill until all streams flow again: the longest silence of any stream that holds a moment of
the second after the kill, counted from the kill; the usual 0.1 s between two messages is part of it. A stream is lost
if it ends without its whole answer, with an error, or is silent for longer than the service's own deadlines. It is
identical if its tokens (or its text, where it does not ask for them), the end of its answer and the counts of its usage
are those of the undisturbed one. Requests that are refused with 429 or 503 and Retry-After before they begin are sent
again and counted apart. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.kill_harness import KINDS, READY_S, Killed, Kind, ServedCluster, served_cluster, service_config
from benchmarks.results_file import arguments, console, progress, publish
from benchmarks.steady_streams import Case, StreamRecord, Streams, cases, requests

PAUSE_S = (0.5, 2.5)  # between two kills at least
SETTLED_S = 2.5  # a kind is whole for so long before it is killed again: coordinators have found its new process
FLOW_S = 2.0  # no stream is silent for longer when a process is killed
WINDOW_S = 1.0  # after a kill, in which the silences that it causes begin
CASES = 24


@dataclass(slots=True)
class Disturbed:
    """The kills of a run and the records of its streams."""

    killed: list[Killed] = field(default_factory=list)
    records: list[StreamRecord] = field(default_factory=list)
    refused: int = 0

    def recoveries(self, kind: Kind | None = None) -> list[float]:
        """Seconds after each kill, of one kind or of all, until all streams flowed again."""
        return [self._recovery(kill.at) for kill in self.killed if kind in (None, kill.kind)]

    def lost(self) -> list[StreamRecord]:
        """Streams without their whole answer."""
        return [record for record in self.records if record.outcome == "lost"]

    def different(self) -> list[StreamRecord]:
        """Streams that differ from the undisturbed answer."""
        return [record for record in self.records if record.differs()]

    def result(self) -> dict[str, Any]:
        """Counts and percentiles, of all kills and of each kind."""
        kinds = [kind for kind in KINDS if any(kill.kind == kind for kill in self.killed)]
        return {
            "answers": sum(record.outcome == "ended" for record in self.records),
            "kills": {kind: sum(kill.kind == kind for kill in self.killed) for kind in kinds},
            "lost": len(self.lost()),
            "identical": not self.different(),
            "refused": self.refused,
            **percentiles(self.recoveries()),
            "recovery_s": {kind: [round(p, 2) for p in _p50_p99(self.recoveries(kind))] for kind in kinds},
        }

    def failures(self) -> list[str]:
        """A sentence for each stream that was lost or differs, with the kills around its last message."""
        return [
            f"{self._before(record)}: {record.why or record.differs()}"
            for record in self.records
            if record.outcome == "lost" or record.differs()
        ]

    def _recovery(self, at: float) -> float:
        return max((s for record in self.records if (s := record.silence(at, WINDOW_S)) is not None), default=0.0)

    def _before(self, record: StreamRecord) -> str:
        during = [kill for kill in self.killed if kill.at > record.marks[0]]
        kills = ", ".join(f"{kill.kind} {kill.at - record.marks[-1]:+.1f} s" for kill in during) or "no kill"
        return f"{len(record.marks) - 1} messages, last message and {kills}"


def percentiles(recoveries: Sequence[float]) -> dict[str, float]:
    """The keys of the result."""
    p50, p99 = _p50_p99(recoveries)
    return {"recovery_s_p50": round(p50, 2), "recovery_s_p99": round(p99, 2)}


def _p50_p99(values: Sequence[float]) -> tuple[float, float]:
    p50, p99 = np.percentile(values, (50, 99)) if values else (0.0, 0.0)
    return float(p50), float(p99)


class Killer:
    """Kills processes of a cluster while streams run, and records the times."""

    def __init__(self, served: ServedCluster, streams: Streams, draw: random.Random) -> None:
        self.killed: list[Killed] = []
        self._served, self._streams, self._draw = served, streams, draw
        self._whole_since: dict[Kind, float] = {}

    async def run(self, rounds: int, done: Callable[[], None]) -> None:
        """Kill each kind so often. Raises TimeoutError when a kind does not come back, or a stream stays silent."""
        left = dict.fromkeys(KINDS, rounds)
        async with asyncio.TaskGroup() as kills:
            while any(left.values()):
                kind = await self.ready([kind for kind in KINDS if left[kind]])
                left[kind] -= 1
                kills.create_task(self.kill(kind)).add_done_callback(lambda task: done())
                await asyncio.sleep(self._draw.uniform(*PAUSE_S))

    async def ready(self, kinds: Sequence[Kind]) -> Kind:
        """One of these kinds, once it may be killed."""
        until = time.monotonic() + READY_S
        while True:
            whole = await self._settled()
            choice = [kind for kind in kinds if kind in whole]
            if choice and self._streams.flowing(FLOW_S):
                return self._draw.choice(choice)
            if time.monotonic() > until:
                silent = sum(time.monotonic() - record.marks[-1] > FLOW_S for record in self._streams.open())
                raise TimeoutError(
                    f"whole for {READY_S:g} s: {sorted(whole)}; of {kinds} none; {silent} silent streams"
                )
            await asyncio.sleep(0.2)

    async def kill(self, kind: Kind) -> None:
        """End a process of the kind now."""
        self._whole_since.pop(kind, None)
        self.killed.append(await asyncio.to_thread(self._served.kill, kind, self._draw))

    async def _settled(self) -> set[Kind]:
        whole, now = await asyncio.to_thread(self._served.whole), time.monotonic()
        self._whole_since = {kind: self._whole_since.get(kind, now) for kind in whole}
        return {kind for kind, since in self._whole_since.items() if now - since >= SETTLED_S}


async def disturb(
    served: ServedCluster, asked: Sequence[Case], count: int, rounds: int, draw: random.Random, done: Callable[[], None]
) -> Disturbed:
    """Streams, and kills while they run; ends when each stream that has begun is over."""
    streams = Streams(served.url, asked, count, draw)
    killer = Killer(served, streams, draw)
    running = asyncio.create_task(streams.run())
    try:
        await killer.run(rounds, done)
    except* TimeoutError as overdue:
        console().print(*(str(error) for error in overdue.exceptions))
    finally:
        streams.stop()
        await running
    return Disturbed(killer.killed, streams.records, streams.refused)


def run(options: argparse.Namespace) -> dict[int, Disturbed]:
    """The result by the number of replicas."""
    draw = random.Random(options.seed)
    config = service_config(1)
    bodies = requests(config.name, CASES, tuple(options.tokens), options.seed)
    console().print(f"{len(bodies)} answers of an undisturbed service")
    asked = asyncio.run(cases(config, bodies))
    rounds = shares(options.rounds, options.replicas)
    results = {}
    with progress(console()) as bar:
        task = bar.add_task("kills", total=sum(rounds.values()) * len(KINDS))
        for replicas, share in rounds.items():
            with served_cluster(service_config(replicas)) as served:
                results[replicas] = asyncio.run(
                    disturb(served, asked, options.streams, share, draw, lambda: bar.advance(task))
                )
    return results


def shares(rounds: int, replicas: int | None) -> dict[int, int]:
    """Rounds by number of replicas: where one alone lives each takes longer, and a quarter of them is enough."""
    split = {2: rounds - rounds // 4, 1: rounds // 4} if replicas is None else {replicas: rounds}
    return {replicas: share for replicas, share in split.items() if share}


def summary(results: dict[int, Disturbed], streams: int) -> dict[str, Any]:
    """The benchmark's JSON object: all together, and by the number of replicas."""
    both = Disturbed(
        [kill for one in results.values() for kill in one.killed],
        [record for one in results.values() for record in one.records],
        sum(one.refused for one in results.values()),
    )
    parts = {f"replicas_{replicas}": one.result() for replicas, one in results.items()}
    whole = {name: value for name, value in both.result().items() if name != "recovery_s"}
    return {"streams": streams, **whole, **parts}


def table(results: dict[int, Disturbed]) -> Table:
    """Recovery of each kind, median and 99th percentile in seconds."""
    shown = Table("killed", *(f"{replicas} replicas, {what}" for replicas in results for what in ("n", "p50", "p99")))
    for kind in KINDS:
        cells = []
        for one in results.values():
            recoveries = one.recoveries(kind)
            cells += [str(len(recoveries)), *(f"{seconds:.2f}" for seconds in _p50_p99(recoveries))]
        shown.add_row(kind, *cells)
    return shown


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="kills of each kind of process (20)")
    parser.add_argument("--replicas", type=int, choices=(1, 2), help="of each model and the coordinator (both in turn)")
    parser.add_argument("--streams", type=int, default=16, help="at any time (16)")
    parser.add_argument("--tokens", type=int, nargs=2, default=[400, 1_000], help="of an answer, from, to (400 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of requests and of the times of the kills (0)")
    options = parser.parse_args()
    results = run(options)
    console().print(table(results))
    for one in results.values():
        console().print(*one.failures(), sep="\n")
    publish("faults", summary(results, options.streams), options.save)


if __name__ == "__main__":
    main()
