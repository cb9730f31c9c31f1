"""Measures the growth of a guided step's time with sessions and with context.

    python -m benchmarks.step_scaling [--shape laptop] [--sessions 1 2 4 8 16 32 64] [--contexts 128 512 1024 2048 4096]
        [--launcher processes] [--steps 12] [--threads N] [--rounds 3] [--save]

Without drafts. The time of a step is the difference of two runs of different length over the same prompts, divided by
the steps between them, so that prompts cost nothing here; the median of the rounds. Over each axis
t = constant + linear * n + quadratic * n^2 is fitted to relative errors, and `quadratic_share` is what the last term
makes of the time at the largest n: about 0, or below, where nothing grows faster than linearly. The last line is one
JSON object.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import uvloop

from benchmarks.baselines import Task
from benchmarks.processes import LauncherName, launcher
from benchmarks.results_file import arguments, console, progress, publish
from benchmarks.shapes import SHAPES, Shape, cache_tokens, service_config
from benchmarks.tasks import first, tasks
from benchmarks.workers import Service, service

SHORT = 4  # tokens of the shorter of two runs
LEAST_CONTEXT = 128
Point = tuple[int, int]  # sessions, context


async def step_ms(served: Service, made: Sequence[Task]) -> float:
    """One guided step of all tasks, whose answers are of one length."""
    short = (await served.run("guided_plain", first(made, SHORT), 0.0)).decoded.seconds
    whole = (await served.run("guided_plain", made, 0.0)).decoded.seconds
    return 1_000 * (whole - short) / (made[0].tokens - SHORT)


async def measure(
    shape: Shape,
    points: Sequence[Point],
    steps: int,
    rounds: int,
    threads: int,
    name: LauncherName,
    done: Callable[[], None],
) -> dict[Point, float]:
    """The median step of each point, milliseconds; every round visits all points."""
    tokens = SHORT + steps
    most = max(sessions for sessions, _ in points)
    cache = max(cache_tokens(sessions, context, tokens) for sessions, context in points)
    with tempfile.TemporaryDirectory() as folder:
        config = service_config(shape, Path(folder), cache_tokens=cache, sessions=most, speculate=False)
        times: dict[Point, list[float]] = {point: [] for point in points}
        async with launcher(name, threads) as launch, service(shape, config, 0.8, threads, launch) as served:
            for number in range(rounds + 1):
                for sessions, context in points:
                    made = [tasks(shape, config, 1, context, tokens)[0]] * sessions
                    took = await step_ms(served, made)
                    if number:  # what is slow once is not measured
                        times[sessions, context].append(took)
                    done()
    return {point: median(all_) for point, all_ in times.items()}


def fit(sizes: Sequence[int], times: Sequence[float]) -> dict[str, float]:
    """constant + linear * n + quadratic * n^2 through times (ms) at sizes n, least squares of relative errors."""
    n, t = np.asarray(sizes, float), np.asarray(times, float)
    terms = np.stack([np.ones_like(n), n, n * n], axis=1)
    constant, linear, quadratic = np.linalg.lstsq(terms / t[:, None], np.ones_like(t), rcond=None)[0].tolist()
    largest = float(n.max())
    share = quadratic * largest**2 / (constant + linear * largest + quadratic * largest**2)
    return {"constant_ms": round(constant, 3), "linear_ms": round(linear, 5), "quadratic_share": round(share, 4)}


def result(points: dict[Point, float]) -> dict[str, Any]:
    """The benchmark's JSON object."""
    axes = {
        "sessions": {sessions: took for (sessions, context), took in points.items() if context == LEAST_CONTEXT},
        "context": {context: took for (sessions, context), took in points.items() if sessions == 1},
    }
    return {
        name: {"step_ms": {str(n): round(took, 3) for n, took in sorted(axis.items())}}
        | fit(list(axis), list(axis.values()))
        for name, axis in axes.items()
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", choices=[name for name, shape in SHAPES.items() if shape.target], default="laptop")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 1_024, 2_048, 4_096])
    parser.add_argument("--launcher", choices=["processes", "ray"], default="processes")
    parser.add_argument("--steps", type=int, default=12, help="between the two runs (12)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every model (all cores)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    points = [(sessions, LEAST_CONTEXT) for sessions in sorted({1, *options.sessions})]
    points += [(1, context) for context in sorted(set(options.contexts) - {LEAST_CONTEXT})]
    with progress(console()) as bar, asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
        task = bar.add_task("points", total=len(points) * (options.rounds + 1))
        measured = loop.run(
            measure(
                SHAPES[options.shape],
                points,
                options.steps,
                options.rounds,
                options.threads,
                options.launcher,
                lambda: bar.advance(task),
            )
        )
    publish(f"scaling-{options.shape}", result(measured), options.save)


if __name__ == "__main__":
    main()
