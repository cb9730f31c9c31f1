"""Compares the service with transformers' `generate()`, the published loop and vLLM's server, on published weights.

    python -m benchmarks.peers [--parts same other http] [--sessions 1 8 32] [--tokens 48] [--rounds 5] [--threads N]
                               [--save]

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

The part `http` needs `make venv-vllm`, and compares over HTTP what users run: the service on Ray Serve with every role
on the vLLM engine, and vLLM's own server (`benchmarks.vllm_server`) of the same target, which is the way vllm. One
client, in a process of its own, sends the same ids to both. Not equal: the service's router, proxy, coordinator and
small models are processes beside the target, and Ray's stay a little busy while vLLM's server computes.

tokens_per_s: from the request to the last token of all sessions, prompts included. first_token_s: mean over sessions,
of `generate` as a streamer sees it; of `loop` from a sequence's own start, so without the wait for those before it.
memory_mb: the peak of the resident sets of all processes that take part, added up; the service's coordinator runs in
this process, which has torch loaded, too. Figures are medians over the rounds, ratios those of medians. equal: share
of the answers that are the same, token by token. The last line is a list of JSON objects, one for each family and
number of sessions. Parts that are chosen by --parts are saved as `peers_PART`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Any

import uvloop
from rich.table import Table

from actors.api.generation import ROLES, Role
from actors.config import ServiceConfig, load_config
from actors.engine.sizing import cache_bytes_per_token
from actors.preflight import VLLM_PYTHON, load_tokenizers, position_limit
from actors.text.tokenizer import RoleTokenizer
from benchmarks.baselines import Baselines, Decoded, Task
from benchmarks.cpu_time import descendants
from benchmarks.peak_memory import PeakMemory, forget_peak, peak
from benchmarks.processes import Launch, Worker, launcher, thread_environment
from benchmarks.real_prompts import prompts
from benchmarks.real_trio import FAMILIES, real_trio
from benchmarks.results_file import arguments, console, progress, publish
from benchmarks.shapes import Shape, cache_tokens, service_config
from benchmarks.sse_client import await_answer, read_all
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
    "target_over_vllm": ("target", "vllm"),
    "guided_over_vllm": ("guided", "vllm"),
}
SAME = {"target_equal_generate": ("target", "generate"), "guided_equal_static": ("guided", "static")}
SAME |= {"target_equal_vllm": ("target", "vllm")}
PARTS = (*FAMILIES, "http")
READY_S = 900.0  # three models load on vLLM
SETTLE_S = 2.0  # vLLM's worker waits awake for a second after its last step
NAME = "target"  # of the model that vLLM's server offers
HTTP: dict[str, Any] = {
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
    "stream_options": {"include_usage": True},
    "return_token_ids": True,
}


@dataclass(frozen=True, slots=True)
class Plan:
    """Parameters of a measurement of one family."""

    shape: Shape
    sessions: tuple[int, ...] = (1, 8, 32)
    tokens: int = 48  # of each answer
    rounds: int = 5
    threads: int = 1  # of the target and of each peer
    guided_peers: bool = True  # the loop and its batch, which need one vocabulary

    @property
    def cache(self) -> int:
        """Tokens of each model's cache."""
        return cache_tokens(max(self.sessions), CONTEXT, self.tokens)

    def config(self, folder: Path) -> ServiceConfig:
        """The service's configuration."""
        most = max(self.sessions)
        return service_config(self.shape, folder, cache_tokens=self.cache, sessions=most, speculate=True)

    def http_config(self) -> ServiceConfig:
        """The configuration of the published models' service, with all roles on vLLM. Raises RealModelError."""
        from cluster.real.study import service as real_service  # loads Ray, whose memory would count in other parts

        args = real_service()["applications"][0]["args"]
        for role, model in args["models"].items():
            threads = self.threads if role == "target" else max(1, self.threads // 2)
            own = {"engine": "vllm", "runtime_env": {"env_vars": thread_environment(threads)}}
            args["models"][role] = model | own | {"cache_tokens": self.cache}
        args["coordinator"] = {"max_sessions": max(self.sessions)}
        return load_config(args | {"exchange": {"audit_every": 0}})

    def comparisons(self, tokenizers: Mapping[Role, RoleTokenizer], suffix: str = "") -> list[Comparison]:
        """A comparison without runs for each number of sessions."""
        return [
            Comparison(
                self.shape.name + suffix,
                [tasks(tokenizers, count, self.tokens, number) for number in range(self.rounds)],
            )
            for count in self.sessions
        ]


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


def over_http(url: str, fields: dict[str, Any], processes: Sequence[int], client: Executor) -> Way:
    """A way through a server. fields: of every request's body; processes: those that take part, for the memory."""

    async def run(asked: Sequence[Task]) -> Measured:
        bodies = [HTTP | fields | {"prompt": task.prompts["target"], "max_tokens": task.tokens} for task in asked]
        await asyncio.sleep(SETTLE_S)
        for process in processes:
            forget_peak(process)
        streams = await asyncio.get_running_loop().run_in_executor(client, read_all, url, bodies)
        seconds = max(stream.last for stream in streams) - min(stream.asked for stream in streams)
        first_s = [stream.first - stream.asked for stream in streams]
        decoded = Decoded([list(stream.ids) for stream in streams], seconds, first_s)
        return Measured(decoded, sum(map(peak, processes)))

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
        results = plan.comparisons(tokenizers)
        async with launcher("processes", plan.threads) as launch, AsyncExitStack() as stack:
            running = await stack.enter_async_context(service(plan.shape, config, 0.0, plan.threads, launch))
            found = await ways(plan, running, launch)
            await all_rounds(found, results, plan.rounds, done)
    return results


@contextmanager
def http_ways(plan: Plan, config: ServiceConfig, context: int) -> Iterator[dict[str, Way]]:
    """The ways over HTTP: of the service with this configuration, and of vLLM's server of its target.

    context: most tokens of a request. Raises ServerFailed, LaunchError, TimeoutError.
    """
    from benchmarks.vllm_server import vllm_server  # load Ray
    from cluster.launch import running_service

    target = Path(config.models.target.path)
    shape = json.loads((target / "config.json").read_text(encoding="utf-8"))
    cache_bytes = 2 * plan.cache * cache_bytes_per_token(shape, "float32")  # vLLM fills up groups of unlike layers
    with (
        running_service(config) as url,
        vllm_server(target, NAME, context, cache_bytes, plan.threads) as (theirs, root),
        ProcessPoolExecutor(1, get_context("spawn")) as client,
    ):
        await_answer(f"{url}/ready", READY_S)
        their_processes = [root, *descendants(root)]
        our_processes = [each for each in descendants(os.getpid()) if each not in their_processes]
        alone = {"model": f"{config.name}/target", "speculation": {"drafts": 0}}
        yield {
            "vllm": over_http(theirs, {"model": NAME}, their_processes, client),
            "target": over_http(url, alone, our_processes, client),
            "guided": over_http(url, {"model": config.name, "guidance": {"alpha": 1.0}}, our_processes, client),
        }


def run_http(plan: Plan) -> list[Comparison]:
    """All rounds of a plan over HTTP. Raises as `http_ways`."""
    config = plan.http_config()
    tokenizers = load_tokenizers(config)
    results, context = plan.comparisons(tokenizers, "-http"), position_limit(config, "target", tokenizers["target"])
    with http_ways(plan, config, context) as found, asyncio.Runner() as loop, progress(console()) as bar:
        task = bar.add_task("rounds over HTTP", total=plan.rounds * len(plan.sessions))
        loop.run(all_rounds(found, results, plan.rounds, lambda: bar.advance(task)))
    return results


async def all_rounds(
    found: Mapping[str, Way], results: Sequence[Comparison], rounds: int, done: Callable[[], None]
) -> None:
    """Warm every way, then run the rounds of all results in turn."""
    for result in results:
        await warm(found, result)
    for number in range(rounds):
        for result in results:
            await round_of(found, result, number)
            done()


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
        if one := next((value for value in values if isinstance(value, dict)), None):
            for figure in one:
                shown.add_row(f"{name}: {figure}", *("" if each is None else f"{each[figure]:,}" for each in values))
        else:
            shown.add_row(name, *("" if each is None else str(each) for each in values))
    return shown


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is compared (all)")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 8, 32], help="decoded together (1 8 32)")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of each session (48)")
    parser.add_argument("--rounds", type=int, default=5, help="of every number of sessions (5)")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="of the target and of each peer (all cores)"
    )
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    options = parse(given)
    trio, sizes = real_trio(), (tuple(options.sessions), options.tokens, options.rounds, options.threads)
    parts, status = [part for part in PARTS if part in options.parts], 0
    plans = {family: Plan(trio.shape(family), *sizes, guided_peers=family == "same") for family in FAMILIES}
    alone = [plans[family] for family in FAMILIES if family in parts]
    results = run(alone) if alone else []
    if "http" in parts and not VLLM_PYTHON.exists():
        console().print("skipped: http, since there is no vLLM: run `make venv-vllm`")
    elif "http" in parts:
        try:
            results += run_http(plans["other"])
        except (RuntimeError, TimeoutError) as error:  # the other parts are worth keeping
            console().print(f"failed: http: {error}", markup=False)
            status = 1
    if results:
        console().print(table(trio.adapter.name, results))
    settings = {key: value for key, value in vars(options).items() if key != "save"} | {"guider": trio.adapter.name}
    details = [settings, *(result.details() for result in results)]
    name = "_".join(["peers", *(parts if parts != list(PARTS) else ())])
    publish(name, [result.result() for result in results], options.save, details)
    return status


if __name__ == "__main__":
    sys.exit(main())
