"""Measures the extra time of a decoding step when the target is of another family than the small pair.

    python -m benchmarks.family_step [--rounds 5] [--save]

The embedded trio, and the same pair beside the embedded target of another family, which has the same shape: in one
process, without drafts, interleaved. A step is the time in which every session gets one token. The last line is a JSON
list with one object for each number of sessions.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from actors.api.generation import ROLES, Finished, Role
from actors.api.sampling_params import Sampling
from actors.config import ServiceConfig
from actors.replica.build import load_role
from actors.replica.engine_thread import Engine
from benchmarks.effect import OTHER_TARGET, Unfinished, request
from benchmarks.results_file import arguments, console, progress, publish
from cluster.demo.task import questions
from tests.support.local_service import LocalService, decode, load_engines, local_service, trio_config

SESSIONS = (1, 64)
STEPS = {1: 120, 64: 40}
FAMILIES = ("same", "other")


@dataclass(slots=True)
class Steps:
    """Milliseconds of a step, by round and family."""

    sessions: int
    took: dict[str, list[float]] = field(default_factory=lambda: {family: [] for family in FAMILIES})

    def result(self) -> dict[str, Any]:
        """The benchmark's JSON object."""
        same, other = (round(median(self.took[family]), 3) for family in FAMILIES)
        more = [b - a for a, b in zip(self.took["same"], self.took["other"], strict=True)]
        return {"sessions": self.sessions, "same_ms": same, "other_ms": other, "more_ms": round(median(more), 3)}


def config_of(target: Path | None) -> ServiceConfig:
    """The trio without drafts and audits, with another target if one is named."""
    crowd = {"max_sessions": 64, "max_waiting": 64}
    config = trio_config(
        batch_invariant=False, exchange={"audit_every": 0}, speculation={"drafts": 0}, coordinator=crowd
    )
    return config if target is None else config.with_target(str(target))


async def measure(rounds: int, done: Callable[[], None]) -> list[Steps]:
    """Every number of sessions in each family, `rounds` times in turn."""
    plain, aligned = config_of(None), config_of(OTHER_TARGET)
    engines = load_engines(plain)
    others: dict[Role, Engine] = {role: load_role(aligned, role) for role in ROLES}
    async with local_service(plain, engines) as same, local_service(aligned, others) as strange:
        found = [Steps(sessions) for sessions in SESSIONS]
        for service in (same, strange):
            await _decode(service, 4, 10)  # what is slow once is not measured
        for _ in range(rounds):
            for steps in found:
                for family, service in zip(FAMILIES, (same, strange), strict=True):
                    steps.took[family].append(await _decode(service, steps.sessions, STEPS[steps.sessions]))
                done()
        return found


async def _decode(service: LocalService, sessions: int, tokens: int) -> float:
    """Milliseconds a step, the prompts' included."""
    sampling = Sampling(temperature=0.6, max_tokens=tokens, ignore_eos=True)
    requests = [
        replace(request(service, "guided", question, 1.0, f"s{number}"), sampling=sampling, seed=number)
        for number, question in enumerate(questions("held_out", 4, sessions))
    ]
    began = time.perf_counter()
    for answer in await asyncio.gather(*(decode(service.coordinators[0], one) for one in requests)):
        if not isinstance(answer.end, Finished) or answer.end.reason != "length":
            raise Unfinished(f"a session ended otherwise than by its length: {answer.end}")
    return 1_000 * (time.perf_counter() - began) / tokens


def table(found: Sequence[Steps]) -> Table:
    """Every figure, by number of sessions."""
    rows = [steps.result() for steps in found]
    shown = Table(*rows[0], title="one step, without drafts")
    for row in rows:
        shown.add_row(*(f"{value:,}" for value in row.values()))
    return shown


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of each number of sessions (5)")
    options = parser.parse_args()
    with progress(console()) as bar:
        task = bar.add_task("rounds", total=options.rounds * len(SESSIONS))
        found = asyncio.run(measure(options.rounds, lambda: bar.advance(task)))
    console().print(table(found))
    publish("family_step", [steps.result() for steps in found], options.save)


if __name__ == "__main__":
    main()
