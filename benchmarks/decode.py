"""Compares guided decoding through the service with the target alone, and with decoding without a service.

    python -m benchmarks.decode [--shape laptop] [--sessions 1 32] [--agreement 0.8] [--no-speculation]
        [--launcher processes] [--context 32] [--tokens 48] [--threads N] [--rounds 5] [--sweep agreement] [--save]

Three model processes and a coordinator in this one; baselines in a process of their own. The target and the baselines
compute with the same number of threads, the service's small models with half of it. A round runs every variant once, in
an order that rotates, so that all of them see the same machine; every round has prompts of its own. A rate is a median
over the rounds in tokens per second from request to last token, prompts included; a ratio is the median of the rounds'
ratios. Shapes other than the trio have dummy weights that agree as often as `--agreement` says; the trio agrees as it
does. The last line is a JSON object, or a list of them for several numbers of sessions or `--sweep`:

guided, target: through the service, with drafts and without. guided_plain: without drafts. target_drafted: the target
alone with the guider's drafts. loop: the published code's way, one sequence after another. static: a padded batch.
target_plain: the target alone in plain transformers, a padded batch. acceptance: of drafted tokens, null without any.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import uvloop
from rich.table import Table

from actors.config import ServiceConfig
from benchmarks.baselines import Baselines, Decoded, Task
from benchmarks.processes import Launch, LauncherName, Worker, launcher
from benchmarks.results_file import arguments, console, progress, publish
from benchmarks.shapes import SHAPES, Shape, cache_tokens, service_config
from benchmarks.tasks import first, tasks
from benchmarks.workers import Mode, Phases, Served, Service, service

WARM_TOKENS = 4
LOOP_TASKS = 2  # decoded one after another in a round; their rate does not depend on how many there are
AGREEMENTS = (0.3, 0.5, 0.65, 0.8, 0.9, 0.95)
RATIOS = {
    "guided_over_target": ("guided", "target"),
    "guided_over_loop": ("guided", "loop"),
    "guided_over_static": ("guided", "static"),
    "guided_over_plain": ("guided", "guided_plain"),
    "guided_over_target_drafted": ("guided", "target_drafted"),
    "target_over_target_plain": ("target", "target_plain"),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """Parameters of a measurement."""

    shape: Shape
    sessions: tuple[int, ...]
    agreement: float = 0.8
    speculate: bool = True
    launcher: LauncherName = "processes"
    context: int = 32  # mean tokens of a prompt
    tokens: int = 48  # mean tokens of an answer
    threads: int = 1  # of each model
    rounds: int = 5
    temperature: float = 0.0
    baselines: bool = True

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Variants that run through the service; guided comes first."""
        return ("guided", "guided_plain", "target", "target_drafted") if self.speculate else ("guided_plain", "target")

    @property
    def set_agreement(self) -> float | None:
        """The agreement of dummy weights; None for the trio, which has its own."""
        return self.agreement if self.shape.folders is None else None

    def config(self, folder: Path) -> ServiceConfig:
        """The service's configuration; its vocabulary is written into `folder`."""
        most = max(self.sessions)
        cache = cache_tokens(most, 3 * self.context // 2, 3 * self.tokens // 2)
        return service_config(self.shape, folder, cache_tokens=cache, sessions=most, speculate=self.speculate)

    def tasks(self, config: ServiceConfig, sessions: int, number: int) -> list[Task]:
        """The tasks of a round."""
        return tasks(self.shape, config, sessions, self.context, self.tokens, number)


Variant = Callable[[Sequence[Task]], Awaitable[Decoded]]


@dataclass(slots=True)
class Rounds:
    """Results with one number of sessions: tokens per second of every variant, by round."""

    sessions: int
    tasks: list[list[Task]]  # by round
    agreement: float | None  # as it was set; the trio's cannot be
    rates: dict[str, list[float]] = field(default_factory=dict)
    phases: dict[Mode, list[Phases]] = field(default_factory=dict)
    drafted: int = 0  # while guided
    accepted: int = 0
    hidden: int = 0  # of the drafted, those made while an earlier window was verified

    def took(self, name: str, decoded: Decoded) -> None:
        self.rates.setdefault(name, []).append(decoded.tokens / decoded.seconds)

    def served(self, mode: Mode, served: Served) -> None:
        self.phases.setdefault(mode, []).append(served.phases)
        if mode == "guided":
            self.drafted += served.drafted
            self.accepted += served.accepted
            self.hidden += served.hidden

    def result(self) -> dict[str, Any]:
        """The benchmark's JSON object. Without speculation the guided rate is the plain one."""
        rates = dict(self.rates)
        if "guided" not in rates:
            rates["guided"] = rates.pop("guided_plain")
        ratios = {
            name: median_ratio(rates[over], rates[under])
            for name, (over, under) in RATIOS.items()
            if over in rates and under in rates
        }
        return {
            "sessions": self.sessions,
            **{f"{name}_tps": round(median(rates[name]), 2) for name in sorted(rates)},
            **ratios,
            "acceptance": round(self.accepted / self.drafted, 4) if self.drafted else None,
            "agreement": self.agreement,
        }

    def details(self) -> dict[str, Any]:
        """Every round's rates, and the shares of the service's time."""
        spent = {mode: _middle(all_).result() for mode, all_ in self.phases.items()}
        rates = {name: [round(rate, 2) for rate in all_] for name, all_ in self.rates.items()}
        return {"sessions": self.sessions, "agreement": self.agreement, "phases": spent, "rates": rates}


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the rounds' ratios of two variants' rates."""
    return round(median(a / b for a, b in zip(over, under, strict=True)), 3)


def _middle(phases: Sequence[Phases]) -> Phases:
    """The round whose step is the median."""
    return sorted(phases, key=lambda each: each.step_ms)[len(phases) // 2]


class Bench:
    """Variants by name; each decodes tasks when it is called."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.variants: dict[str, Variant] = {}
        self._now: Rounds | None = None  # where a service's figures belong; none while it warms up
        self._turn = 0

    def add_service(self, served: Service) -> None:
        for mode in self.plan.modes:
            self.variants[mode] = self._through(served, mode)

    def add_baselines(self, worker: Worker) -> None:
        def called(name: str) -> Variant:
            async def run(tasks: Sequence[Task]) -> Decoded:
                if name == "loop":
                    tasks = [tasks[(self._turn + n) % len(tasks)] for n in range(min(LOOP_TASKS, len(tasks)))]
                decoded: Decoded = await worker.call(name, tasks, self.plan.temperature)
                return decoded

            return run

        self.variants |= {"loop": called("loop"), "static": called("static"), "target_plain": called("target")}

    async def warm(self, rounds: Rounds) -> None:
        """Run every variant once, briefly, so that first-time costs are not measured."""
        for variant in self.variants.values():
            await variant(first(rounds.tasks[0], WARM_TOKENS))

    async def round(self, rounds: Rounds, number: int) -> None:
        """Run every variant once on the tasks of this round."""
        names = list(self.variants)
        start = self._turn % len(names)
        self._now = rounds
        for name in names[start:] + names[:start]:
            rounds.took(name, await self.variants[name](rounds.tasks[number]))
        self._now = None
        self._turn += 1

    def _through(self, through: Service, mode: Mode) -> Variant:
        async def run(tasks: Sequence[Task]) -> Decoded:
            served = await through.run(mode, tasks, self.plan.temperature)
            if self._now is not None:
                self._now.served(mode, served)
            return served.decoded

        return run


async def measure(plan: Plan, done: Callable[[], None]) -> list[Rounds]:
    """Measure everything of a plan; `done` is called after each round."""
    with tempfile.TemporaryDirectory() as folder:
        config = plan.config(Path(folder))
        results = [
            Rounds(count, [plan.tasks(config, count, number) for number in range(plan.rounds)], plan.set_agreement)
            for count in plan.sessions
        ]
        parts = [("service", "baselines")] if plan.shape.together else [("baselines",), ("service",)]
        for part in parts:
            async with launcher(plan.launcher, plan.threads) as launch, AsyncExitStack() as stack:
                bench = Bench(plan)
                if "service" in part:
                    entered = service(plan.shape, config, plan.agreement, plan.threads, launch)
                    bench.add_service(await stack.enter_async_context(entered))
                if "baselines" in part and plan.baselines:
                    bench.add_baselines(await _baselines(plan, launch))
                await _rounds(plan, bench, results, done)
    return results


async def _baselines(plan: Plan, launch: Launch) -> Worker:
    return await launch(Baselines, plan.shape, plan.agreement, plan.threads)


async def _rounds(plan: Plan, bench: Bench, results: Sequence[Rounds], done: Callable[[], None]) -> None:
    for rounds in results:
        await bench.warm(rounds)
    for number in range(plan.rounds):
        for rounds in results:
            await bench.round(rounds, number)
            done()


def run(plans: Sequence[Plan]) -> list[Rounds]:
    """One plan after another."""
    with progress(console()) as bar:
        total = sum(plan.rounds * len(plan.sessions) * (1 if plan.shape.together else 2) for plan in plans)
        task = bar.add_task("rounds", total=total)
        results: list[Rounds] = []
        for plan in plans:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
                results += loop.run(measure(plan, lambda: bar.advance(task)))
        return results


def table(results: Sequence[Rounds]) -> Table:
    """Every figure, by number of sessions and agreement."""
    rows = [rounds.result() for rounds in results]
    shown = Table("", *(f"{row['sessions']} at {row['agreement']}" for row in rows), title="tokens per second")
    for name in rows[0]:
        shown.add_row(name, *(str(row[name]) for row in rows))
    for mode in results[0].phases:
        for share in _middle(results[0].phases[mode]).result():
            values = (str(_middle(rounds.phases[mode]).result()[share]) for rounds in results)
            shown.add_row(f"{mode}: {share}", *values)
    return shown


def parse() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="laptop")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 32], help="decoded together (1 32)")
    parser.add_argument("--agreement", type=float, default=0.8, help="of guider and combined choice (0.8)")
    parser.add_argument("--no-speculation", action="store_true", help="no drafts anywhere")
    parser.add_argument("--launcher", choices=["processes", "ray"], default="processes")
    parser.add_argument("--context", type=int, default=32, help="mean tokens of a prompt (32)")
    parser.add_argument("--tokens", type=int, default=48, help="mean tokens of an answer (48)")
    parser.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count(),
        help="of the target and of every baseline (all cores); small models get half",
    )
    parser.add_argument("--rounds", type=int, default=5, help="of every number of sessions (5)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of every choice (0)")
    parser.add_argument("--no-baselines", action="store_true", help="only what runs through the service")
    parser.add_argument("--sweep", choices=["agreement"], help=f"measure at {', '.join(map(str, AGREEMENTS))}")
    return parser.parse_args()


def main() -> None:
    options = parse()
    plans = [
        Plan(
            SHAPES[options.shape],
            tuple(options.sessions),
            agreement,
            not options.no_speculation,
            options.launcher,
            options.context,
            options.tokens,
            options.threads,
            options.rounds,
            options.temperature,
            not options.no_baselines,
        )
        for agreement in (AGREEMENTS if options.sweep else (options.agreement,))
    ]
    results = run(plans)
    console().print(table(results))
    objects = [rounds.result() for rounds in results]
    kind = "-sweep" if options.sweep else "-plain" if options.no_speculation else ""
    name = f"decode-{options.shape}{kind}"
    settings = {key: value for key, value in vars(options).items() if key != "save"}
    details = [settings, *(rounds.details() for rounds in results)]
    publish(name, objects if len(objects) > 1 else objects[0], options.save, details)


if __name__ == "__main__":
    main()
