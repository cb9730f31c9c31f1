"""Measures a service under four times the load that it can decode.

    python -m benchmarks.overload [--seconds 60] [--rounds 3] [--times 4] [--sessions 32] [--waiting 64]
        [--cache 2560] [--tokens 64] [--threads 1] [--save]

The embedded trio in three processes, the router and a coordinator in one, clients in one, over HTTP. A round runs four
loads in turn, each for its part of `--seconds`: as many clients as sessions, which is the capacity; requests at
`--times` that rate, at random times, by clients that ignore refusals; `--times` as many clients as there are places in
sessions and queue, which obey Retry-After; and two users that together send as many requests as in the second load, one
ten times as often as the other. The cache, not `--sessions`, bounds the number of sessions decoded together, unless
`--cache` is large. Each load ends before the next begins.

The last line is a JSON object. offered .. hung are of the second load (failed: ended in another way); a ratio is the
median of the rounds' ratios of tokens a second, of what was admitted, to those at capacity.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal, TypeAlias

import uvloop
from rich.table import Table

from actors.api.generation import ROLES
from benchmarks.crowd_client import CrowdClient, Phase
from benchmarks.http_server import HttpServer
from benchmarks.processes import ModelWorker, Worker, launcher
from benchmarks.results_file import arguments, console, progress, publish
from benchmarks.shapes import SHAPES
from cluster.demo.task import questions
from tests.support.local_service import WEIGHTS, trio_config

Load: TypeAlias = Literal["capacity", "overloaded", "obeying", "unequal"]
LOADS: tuple[Load, ...] = ("capacity", "overloaded", "obeying", "unequal")
BUSY, CALM, TIMES_AS_BUSY = "busy", "calm", 10


@dataclass(frozen=True, slots=True)
class Plan:
    """Parameters of a measurement. times: offered load over capacity. cache: tokens of each role."""

    seconds: float = 60.0
    rounds: int = 3
    times: float = 4.0
    sessions: int = 32
    waiting: int = 64
    cache: int = 2_560
    tokens: int = 64
    threads: int = 1


@dataclass(slots=True)
class Measured:
    """The phases of every round, by load."""

    phases: dict[Load, list[Phase]] = field(default_factory=lambda: {load: [] for load in LOADS})

    def result(self) -> dict[str, Any]:
        """The benchmark's JSON object."""
        fates = self._fates("overloaded")
        obeying = self._fates("obeying")
        return {
            "offered": sum(fates.values()),
            **{fate: fates[fate] for fate in ("admitted", "refused", "hung", "failed")},
            "tokens_per_s_at_capacity": round(median(self.rates("capacity")), 1),
            "tokens_per_s_overloaded": round(median(self.rates("overloaded")), 1),
            "ratio": self._ratio("overloaded"),
            "obeying": {
                "offered": sum(obeying.values()),
                **{fate: obeying[fate] for fate in ("admitted", "refused", "hung", "failed")},
                "ratio": self._ratio("obeying"),
            },
            "fairness": self._fairness(),
        }

    def rates(self, load: Load) -> list[float]:
        """Tokens a second of each round."""
        return [phase.tokens_per_s for phase in self.phases[load]]

    def failures(self) -> list[str]:
        """Reasons of failed requests, and of refusals that lack a header."""
        return sorted(
            {each.why for phases in self.phases.values() for phase in phases for each in phase.outcomes} - {""}
        )

    def _ratio(self, load: Load) -> float:
        pairs = zip(self.rates(load), self.rates("capacity"), strict=True)
        return round(median(rate / capacity for rate, capacity in pairs), 3)

    def _fates(self, load: Load, user: str | None = None) -> Counter[Any]:
        return sum((phase.fates(user) for phase in self.phases[load]), Counter[Any]())

    def _fairness(self) -> dict[str, Any]:
        by_user = {user: self._fates("unequal", user) for user in (BUSY, CALM)}
        admitted = sum(fates["admitted"] for fates in by_user.values())
        fairness: dict[str, Any] = {
            user: {
                "offered": sum(fates.values()),
                "admitted": fates["admitted"],
                "share_of_admitted": round(fates["admitted"] / max(1, admitted), 3),
                "share_of_its_own": round(fates["admitted"] / max(1, sum(fates.values())), 3),
            }
            for user, fates in by_user.items()
        }
        return fairness


@asynccontextmanager
async def crowd(plan: Plan) -> AsyncIterator[Worker]:
    """A client of a running service."""
    models = {role: {"path": str(WEIGHTS / role), "cache_tokens": plan.cache} for role in ROLES}
    places = {"max_sessions": plan.sessions, "max_waiting": plan.waiting}
    config = trio_config(batch_invariant=False, models=models, coordinator=places, exchange={"audit_every": 0})
    secret, asked = secrets.token_bytes(32), [question.text for question in questions("held_out", 3, 64)]
    async with launcher("processes", plan.threads) as launch:
        workers = [await launch(ModelWorker, SHAPES["trio"], role, 0.0, config, secret, plan.threads) for role in ROLES]
        endpoints = [await worker.call("start") for worker in workers]
        server = await launch(HttpServer, config, secret, endpoints)
        await server.call("start")
        url = await server.call("serve")
        yield await launch(CrowdClient, url, config.name, asked, plan.tokens, plan.seconds / plan.rounds)
        for worker in (server, *workers):
            await worker.call("stop")


async def measure(plan: Plan, done: Callable[[], None]) -> Measured:
    """Measure all rounds; `done` is called after each load."""
    measured = Measured()
    async with crowd(plan) as client:
        for _ in range(plan.rounds):
            capacity = await _one(client, measured, "capacity", "closed", plan.sessions)
            done()
            rate = plan.times * capacity.tokens_per_s / plan.tokens
            calm = rate / (1 + TIMES_AS_BUSY)
            await _one(client, measured, "overloaded", "opened", {"": rate})
            done()
            await _one(client, measured, "obeying", "closed", round(plan.times * (plan.sessions + plan.waiting)))
            done()
            await _one(client, measured, "unequal", "opened", {BUSY: rate - calm, CALM: calm})
            done()
    return measured


async def _one(client: Worker, measured: Measured, load: Load, way: str, how_much: Any) -> Phase:
    phase: Phase = await client.call(way, how_much)
    measured.phases[load].append(phase)
    return phase


def run(plan: Plan) -> Measured:
    """Measure, in processes that end afterwards."""
    with progress(console()) as bar, asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
        task = bar.add_task("loads", total=plan.rounds * len(LOADS))
        return loop.run(measure(plan, lambda: bar.advance(task)))


def table(measured: Measured) -> Table:
    """Outcomes of the requests of each load, and its rates by round."""
    fates = ("admitted", "refused", "hung", "failed")
    shown = Table("load", "tokens/s by round", *fates, title="requests")
    for load, phases in measured.phases.items():
        counts: Counter[Any] = sum((phase.fates() for phase in phases), Counter[Any]())
        rates = "  ".join(f"{rate:,.0f}" for rate in measured.rates(load))
        shown.add_row(load, rates, *(f"{counts[fate]:,}" for fate in fates))
    return shown


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    default = Plan()
    parser.add_argument("--seconds", type=float, default=default.seconds, help="of each load, in all rounds (60)")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="of all loads (3)")
    parser.add_argument("--times", type=float, default=default.times, help="what is offered, over capacity (4)")
    parser.add_argument("--sessions", type=int, default=default.sessions, help="places (32)")
    parser.add_argument("--waiting", type=int, default=default.waiting, help="places in the queue (64)")
    parser.add_argument("--cache", type=int, default=default.cache, help="tokens of each model's cache (2560)")
    parser.add_argument("--tokens", type=int, default=default.tokens, help="of each answer (64)")
    parser.add_argument("--threads", type=int, default=default.threads, help="of each model (1)")
    options = vars(parser.parse_args(argv))
    save = options.pop("save")
    measured = run(Plan(**options))
    console().print(table(measured))
    rates = {load: [round(rate, 1) for rate in measured.rates(load)] for load in LOADS}
    publish("overload", measured.result(), save, [options, {"tokens_per_s": rates, "failures": measured.failures()}])


if __name__ == "__main__":
    main()
