"""Compares the service with transformers' `generate()` and with the published loop, on published weights.

    python -m benchmarks.peers [--sessions 1 8 32] [--tokens 48] [--rounds 5] [--threads N] [--save]

The models are those of `benchmarks.real_trio`: a target of the small models' family, and one of another, for which the
published loop has no answer. A round decodes the same prompts, which arrive together, once in each of these ways, in an
order that rotates:

target: the service, the target alone, without drafts. guided: the service, guided, with drafts as configured by
default. guided_plain: without drafts. generate: transformers' `generate()` of the target alone with a static batch.
loop: the published code's way, the three models in threads, one sequence after another. static: the same with a static
batch. Static batches are padded on the left.

Equal for all: weights and float32, greedy choice, the number of new tokens (end tokens end nothing), all cores, and one
brief run before any that counts. While one way runs, the others have their models in memory and compute nothing. Not
equal: the service's models and its coordinator are processes that exchange frames over sockets, and its small models
have half of the threads, while a peer is one process. There is no HTTP on either side.

tokens_per_s: from the request to the last token of all sessions, prompts included. first_token_s: mean over sessions,
of `generate` as a streamer sees it; of `loop` from a sequence's own start, so without the wait for those before it.
memory_mb: the peak of the resident sets of all processes that take part, added up; the service's coordinator runs in
this process, which has torch loaded, too. Figures are medians over the rounds, ratios those of medians. equal: share
of the answers that are the same, token by token. The last line is a list of JSON objects, one for each family and
number of sessions.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import Any

import uvloop
from rich.table import Table

from actors.api.generation import ROLES, Role
from actors.config import ServiceConfig
from actors.preflight import load_tokenizers
from actors.text.tokenizer import RoleTokenizer
from benchmarks.baselines import Baselines, Decoded, Task
from benchmarks.peak_memory import PeakMemory
from benchmarks.processes import Launch, Worker, launcher
from benchmarks.real_prompts import prompts
from benchmarks.real_trio import FAMILIES, real_trio
from benchmarks.results_file import arguments, console, progress, publish
from benchmarks.shapes import Shape, cache_tokens, service_config
from benchmarks.tasks import first
from benchmarks.workers import Mode, Service, service

WARM_TOKENS = 4
LOOP_TASKS = 2  # of a round that the loop decodes; its rate does not depend on how many there are
CONTEXT = 160  # tokens of the longest prompt, about
SERVED: tuple[Mode, ...] = ("target", "guided", "guided_plain")
RATIOS = {
    "target_over_generate": ("target", "generate"),
    "guided_over_loop": ("guided", "loop"),
    "guided_over_static": ("guided", "static"),
    "guided_plain_over_static": ("guided_plain", "static"),
}
SAME = {"target_equal_generate": ("target", "generate"), "guided_equal_static": ("guided", "static")}


@dataclass(frozen=True, slots=True)
class Plan:
    """Parameters of a measurement of one family."""

    shape: Shape
    sessions: tuple[int, ...] = (1, 8, 32)
    tokens: int = 48  # of each answer
    rounds: int = 5
    threads: int = 1  # of the target and of each peer
    guided_peers: bool = True  # the loop and its batch, which need one vocabulary

    def config(self, folder: Path) -> ServiceConfig:
        """The service's configuration."""
        most = max(self.sessions)
        cache = cache_tokens(most, CONTEXT, self.tokens)
        return service_config(self.shape, folder, cache_tokens=cache, sessions=most, speculate=True)


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of one way. memory: bytes at the peak, of all processes that took part."""

    decoded: Decoded
    memory: int


Way = Callable[[Sequence[Task]], Awaitable[Measured]]


@dataclass(slots=True)
class Comparison:
    """Results of one family with one number of sessions: runs by way, in the order of the rounds."""

    name: str
    tasks: list[list[Task]]  # by round
    runs: dict[str, list[Measured]] = field(default_factory=dict)

    def took(self, way: str, measured: Measured) -> None:
        """Keep a run."""
        self.runs.setdefault(way, []).append(measured)

    def result(self) -> dict[str, Any]:
        """The benchmark's JSON object."""
        rates = {way: median(_rates(runs)) for way, runs in self.runs.items()}
        figures = {
            way: {
                "tokens_per_s": round(rates[way], 2),
                "first_token_s": round(median(mean(run.decoded.first_s) for run in runs), 3),
                "memory_mb": round(median(run.memory for run in runs) / 1e6),
            }
            for way, runs in self.runs.items()
        }
        ratios = {name: round(rates[a] / rates[b], 3) for name, (a, b) in RATIOS.items() if {a, b} <= rates.keys()}
        same = {name: round(self._equal(a, b), 4) for name, (a, b) in SAME.items() if {a, b} <= rates.keys()}
        return {"shape": self.name, "sessions": len(self.tasks[0])} | ratios | same | figures

    def details(self) -> dict[str, Any]:
        """The rates of every round."""
        rates = {way: [round(rate, 2) for rate in _rates(runs)] for way, runs in self.runs.items()}
        return {"shape": self.name, "sessions": len(self.tasks[0]), "tokens_per_s": rates}

    def _equal(self, one: str, other: str) -> float:
        """Share of the answers of two ways that are the same."""
        pairs = [
            pair
            for a, b in zip(self.runs[one], self.runs[other], strict=True)
            for pair in zip(a.decoded.answers, b.decoded.answers, strict=True)
        ]
        return sum(a == b for a, b in pairs) / len(pairs)


def _rates(runs: Sequence[Measured]) -> list[float]:
    return [run.decoded.tokens / run.decoded.seconds for run in runs]


def tasks(tokenizers: Mapping[Role, RoleTokenizer], sessions: int, tokens: int, number: int) -> list[Task]:
    """The tasks of a round: prompts of several kinds in each role's ids, and answers of so many tokens."""
    return [
        Task({role: tokenizers[role].encode(prompt, special=True) for role in ROLES}, tokens)
        for prompt in islice(prompts(number), sessions)
    ]


def served(running: Service, mode: Mode) -> Way:
    """A way through the service. Its memory is that of the roles that take part, and of this process."""
    roles: Sequence[Role] = ("target",) if mode == "target" else ROLES
    workers = [running.models[role] for role in roles]

    async def run(asked: Sequence[Task]) -> Measured:
        own = PeakMemory()
        own.forget_peak_memory()
        decoded, memory = await _watched(workers, lambda: running.run(mode, asked, 0.0))
        return Measured(decoded.decoded, memory + own.peak_memory())

    return run


def peer(worker: Worker, method: str) -> Way:
    """A way of the baselines in a worker."""

    async def run(asked: Sequence[Task]) -> Measured:
        values = (asked,) if method == "generate" else (asked, 0.0)
        return Measured(*await _watched([worker], lambda: worker.call(method, *values)))

    return run


def in_turn(way: Way) -> Way:
    """The loop's way with a few of the tasks, other ones in each run."""
    turn = 0

    async def run(asked: Sequence[Task]) -> Measured:
        nonlocal turn
        turn += 1
        return await way([asked[(turn + n) % len(asked)] for n in range(min(LOOP_TASKS, len(asked)))])

    return run


async def _watched(workers: Sequence[Worker], run: Callable[[], Awaitable[Any]]) -> tuple[Any, int]:
    """The outcome of a run, and the sum of the workers' peaks of memory during it."""
    for worker in workers:
        await worker.call("forget_peak_memory")
    outcome = await run()
    return outcome, sum([await worker.call("peak_memory") for worker in workers])


async def ways(plan: Plan, running: Service, launch: Launch) -> dict[str, Way]:
    """Every way of a plan by name. A worker has the models that its ways need, so that its memory is theirs."""
    found: dict[str, Way] = {mode: served(running, mode) for mode in SERVED}
    alone = await launch(Baselines, plan.shape, 0.0, plan.threads, ("target",))
    found["generate"] = peer(alone, "generate")
    if plan.guided_peers:
        three = await launch(Baselines, plan.shape, 0.0, plan.threads)
        found |= {"loop": in_turn(peer(three, "loop")), "static": peer(three, "static")}
    return found


async def measure(plan: Plan, done: Callable[[], None]) -> list[Comparison]:
    """All rounds of a plan; `done` is called after each number of sessions of a round."""
    with tempfile.TemporaryDirectory() as name:
        config = plan.config(Path(name))
        tokenizers = load_tokenizers(config)
        results = [
            Comparison(
                plan.shape.name, [tasks(tokenizers, count, plan.tokens, number) for number in range(plan.rounds)]
            )
            for count in plan.sessions
        ]
        async with launcher("processes", plan.threads) as launch, AsyncExitStack() as stack:
            running = await stack.enter_async_context(service(plan.shape, config, 0.0, plan.threads, launch))
            found = await ways(plan, running, launch)
            for result in results:
                await warm(found, result)
            for number in range(plan.rounds):
                for result in results:
                    await round_of(found, result, number)
                    done()
    return results


async def warm(found: Mapping[str, Way], result: Comparison) -> None:
    """Run every way once, briefly, so that first-time costs are not measured."""
    for way in found.values():
        await way(first(result.tasks[0], WARM_TOKENS))


async def round_of(found: Mapping[str, Way], result: Comparison, number: int) -> None:
    """Run every way once on the tasks of a round."""
    names = list(found)
    start = number % len(names)
    for name in names[start:] + names[:start]:
        result.took(name, await found[name](result.tasks[number]))


def run(plans: Sequence[Plan]) -> list[Comparison]:
    """One plan after another, each with processes of its own."""
    results: list[Comparison] = []
    with progress(console()) as bar:
        task = bar.add_task("rounds", total=sum(plan.rounds * len(plan.sessions) for plan in plans))
        for plan in plans:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
                results += loop.run(measure(plan, lambda: bar.advance(task)))
    return results


def table(guider: str, results: Sequence[Comparison]) -> Table:
    """Every figure, by family and number of sessions."""
    columns = [result.result() for result in results]
    heads = (f"{column['shape']}, {column['sessions']}" for column in columns)
    shown = Table("", *heads, title=f"the service and its peers; guider: {guider}")
    for name in dict.fromkeys(name for column in columns for name in column if name not in ("shape", "sessions")):
        values = [column.get(name) for column in columns]
        if isinstance(values[0], dict):
            for figure in values[0]:
                shown.add_row(f"{name}: {figure}", *("" if each is None else f"{each[figure]:,}" for each in values))
        else:
            shown.add_row(name, *("" if each is None else str(each) for each in values))
    return shown


def parse() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 8, 32], help="decoded together (1 8 32)")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of each session (48)")
    parser.add_argument("--rounds", type=int, default=5, help="of every number of sessions (5)")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="of the target and of each peer (all cores)"
    )
    return parser.parse_args()


def main() -> None:
    options = parse()
    trio, sessions = real_trio(), tuple(options.sessions)
    sizes = sessions, options.tokens, options.rounds, options.threads
    results = run([Plan(trio.shape(family), *sizes, guided_peers=family == "same") for family in FAMILIES])
    console().print(table(trio.adapter.name, results))
    settings = {key: value for key, value in vars(options).items() if key != "save"} | {"guider": trio.adapter.name}
    details = [settings, *(result.details() for result in results)]
    publish("peers", [result.result() for result in results], options.save, details)


if __name__ == "__main__":
    main()
