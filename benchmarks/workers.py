"""A service of three models in processes of their own and a coordinator in this one, and the shares of its time."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

from actors.api.generation import ROLES, Finished, Generate, Role, Usage
from actors.api.guidance import Guidance
from actors.api.sampling_params import Sampling, Thinking
from actors.config import ServiceConfig
from actors.coordinator.coordinator import Coordinator
from actors.directory import Endpoint
from actors.metrics import Counter, Recorder
from actors.preflight import load_tokenizers
from actors.replica.process import collect_rarely
from actors.replica.stats import ReplicaStats
from benchmarks.baselines import Decoded, Task
from benchmarks.exchange import Unfinished, connected
from benchmarks.processes import Launch, ModelWorker, Worker
from benchmarks.shapes import Shape
from tests.support.local_service import decode

Mode: TypeAlias = Literal["guided", "guided_plain", "target", "target_drafted"]
PLAIN: tuple[Mode, ...] = ("guided_plain", "target")
HIDDEN_DRAFTS = "thinklogit_hidden_drafts"  # a counter of coordinators that draft while they verify


@dataclass(frozen=True, slots=True)
class Phases:
    """Shares of a run's wall time; the roles overlap, so they do not add up to 1.

    target, guider, guider_base: forwards of each model. combine: turns of the coordinator. exchange: the rest of the
    target's idle time, in which frames travel and small models are waited for. step_ms: between forwards of the target.
    """

    step_ms: float
    target: float
    guider: float
    guider_base: float
    combine: float

    @property
    def exchange(self) -> float:
        return max(0.0, 1 - self.target - self.combine)

    def result(self) -> dict[str, float]:
        """For the benchmark's JSON."""
        shares = {field.name: round(getattr(self, field.name), 3) for field in fields(self)}
        return shares | {"exchange": round(self.exchange, 3)}


@dataclass(frozen=True, slots=True)
class Served:
    """The answers of a service, the seconds, counts of drafts and the shares of time."""

    decoded: Decoded
    drafted: int
    accepted: int
    hidden: int  # of the drafted, those made while an earlier window was verified
    phases: Phases


@dataclass(frozen=True, slots=True)
class Service:
    """A coordinator that is connected to its models."""

    coordinator: Coordinator
    models: dict[Role, Worker]

    async def run(self, mode: Mode, tasks: Sequence[Task], temperature: float) -> Served:
        """Decode all tasks at once. Raises Unfinished."""
        before, turns_s = await self._stats(), self.coordinator.load().turns_s
        hidden = hidden_drafts(self.coordinator.measured())
        began = time.perf_counter()
        requests = [request(mode, task, number, temperature) for number, task in enumerate(tasks)]
        answers = await asyncio.gather(*(decode(self.coordinator, each) for each in requests))
        seconds = time.perf_counter() - began
        usages = [_usage(answer.end) for answer in answers]
        phases = _phases(before, await self._stats(), self.coordinator.load().turns_s - turns_s, seconds)
        return Served(
            Decoded([answer.tokens for answer in answers], seconds, [answer.first_token - began for answer in answers]),
            sum(usage.drafted_tokens for usage in usages),
            sum(usage.accepted_tokens for usage in usages),
            hidden_drafts(self.coordinator.measured()) - hidden,
            phases,
        )

    async def _stats(self) -> dict[Role, ReplicaStats]:
        return {role: await worker.call("stats") for role, worker in self.models.items()}


@asynccontextmanager
async def service(
    shape: Shape, config: ServiceConfig, agreement: float, threads: int, launch: Launch
) -> AsyncIterator[Service]:
    """Three model workers and a coordinator here."""
    secret = secrets.token_bytes(32)
    models = {role: await launch(ModelWorker, shape, role, agreement, config, secret, threads) for role in ROLES}
    endpoints: list[Endpoint] = [await worker.call("start") for worker in models.values()]

    async def locate() -> Sequence[Endpoint]:
        return endpoints

    coordinator = Coordinator(config, load_tokenizers(config), secret, locate)
    await coordinator.start()
    collect_rarely()
    try:
        await connected(coordinator)
        yield Service(coordinator, models)
    finally:
        await coordinator.stop()
        for worker in models.values():
            await worker.call("stop")


def request(mode: Mode, task: Task, number: int, temperature: float) -> Generate:
    """A task as a request for exactly so many tokens."""
    alone = mode == "target"
    return Generate(
        request_id=f"{mode}-{number}",
        primary="target",
        prompts={"target": task.prompts["target"]} if alone else task.prompts,
        sampling=Sampling(temperature=temperature, max_tokens=task.tokens, ignore_eos=True),
        guidance=Guidance(alpha=1.0 if mode.startswith("guided") else 0.0),
        thinking=Thinking(),
        seed=number,
        drafts=0 if mode in PLAIN else None,
        drafter="guider" if mode == "target_drafted" else "auto",
    )


def hidden_drafts(recorder: Recorder) -> int:
    """Drafts that were made while an earlier window was verified; 0 from a coordinator that makes none."""
    counters = (series for metric, _, series in recorder if metric.name == HIDDEN_DRAFTS)
    return sum(int(series.value) for series in counters if isinstance(series, Counter))


def _usage(end: Any) -> Usage:
    if not isinstance(end, Finished) or end.reason != "length":
        raise Unfinished(f"a session ended otherwise than by its length: {end}")
    return end.usage


def _phases(
    before: dict[Role, ReplicaStats], after: dict[Role, ReplicaStats], turns_s: float, seconds: float
) -> Phases:
    busy = {role: (after[role].forward_s - before[role].forward_s) / seconds for role in ROLES}
    steps = after["target"].forwards - before["target"].forwards
    return Phases(1_000 * seconds / max(1, steps), **busy, combine=turns_s / seconds)
