"""Rows of published models, decided from slices by the service's own exchange and compared with whole rows.

The models are those of `benchmarks.real_trio`: a target of the small models' family, and one of another. Each session
continues a prompt of `benchmarks.real_prompts`, so the rows are those that users' requests meet. How many drafts are
kept is counted by a running service, which decodes the same requests with drafts of the guider. Called by
`python -m benchmarks.fidelity --real --rows N`.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from actors.api.generation import ROLES, Finished, Generate, Role
from actors.api.guidance import Guidance
from actors.api.sampling_params import Sampling, Thinking
from actors.config import ServiceConfig
from actors.decoding.decision import Decisions, compare
from actors.preflight import load_tokenizers
from actors.replica.engine_thread import Engine
from actors.text.tokenizer import RoleTokenizer
from benchmarks.exchange import Unfinished
from benchmarks.lockstep import Lockstep, Step
from benchmarks.real_prompts import prompts
from benchmarks.real_trio import FAMILIES, Family, real_trio
from benchmarks.results_file import console, progress
from benchmarks.shapes import service_config
from tests.support.local_service import decode, load_engines, local_service

SAMPLINGS = (Sampling(temperature=0.6, top_p=0.95), Sampling(temperature=1.0, top_p=0.95), Sampling(temperature=0.0))
TOKENS = 20  # of each session
DRAFTS = 4  # in each window whose drafts are counted
TOGETHER = 16  # sessions that the service decodes at a time
CACHE_TOKENS = 6_144


@dataclass(frozen=True, slots=True)
class RealRows:
    """Rows of one trio at one sampling. Shares are of all rows, masses and bytes are means over them.

    widened: rows that fetched more than the first slices. whole: rows that fetched whole rows. exceeding: rows whose
    nucleus, taken from the whole row, holds ids outside the first candidates. unseen: mass that the widening rule
    estimates outside the first candidates. uncovered: the largest mass that a single model has outside them, exact;
    uncovered_at_last: outside the candidates of the decision. bytes_per_token: of all frames in both directions.
    narrow_bytes_per_token: before any widening. tv_mean, tv_worst: total variation between the distributions that the
    token is drawn from. agreement: rows whose token equals that of whole rows. acceptance: of the guider's drafts,
    `DRAFTS` in a window; `drafted` is their number.
    """

    family: Family
    guided: bool
    temperature: float
    top_p: float
    rows: int
    widened: float
    whole: float
    exceeding: float
    unseen: float
    uncovered: float
    uncovered_at_last: float
    bytes_per_token: float
    narrow_bytes_per_token: float
    tv_mean: float
    tv_worst: float
    agreement: float
    drafted: int = 0
    acceptance: float | None = None


Row = tuple[Step, Decisions]  # a step, and its decisions from whole rows


def measure(rows: int) -> tuple[str, list[RealRows]]:
    """The guider's adapter, and all cases with `rows` rows each. Raises RealModelError if a model is not here."""
    found = []
    with tempfile.TemporaryDirectory() as name, progress(console()) as bar:
        trio = real_trio()
        for family in FAMILIES:
            sizes = {"cache_tokens": CACHE_TOKENS, "sessions": TOGETHER}
            config = service_config(trio.shape(family), Path(name), **sizes, speculate=True, adapt=False)
            tokenizers, engines = load_tokenizers(config), load_engines(config)
            for guided in (False, True):
                for sampling in SAMPLINGS:
                    label = f"{family} family, {'guided' if guided else 'alone'}, T {sampling.temperature:g}"
                    task = bar.add_task(label, total=rows)
                    lockstep = Lockstep(config, tokenizers, engines)
                    decoded = islice(decoded_rows(lockstep, requests(tokenizers, sampling, guided)), rows)
                    case = summary(family, guided, sampling, bar.track(decoded, task_id=task))
                    drafting = islice(requests(tokenizers, sampling, guided, drafts=DRAFTS), -(-rows // TOKENS))
                    drafted, accepted = asyncio.run(drafts_kept(config, engines, list(drafting)))
                    found.append(replace(case, drafted=drafted, acceptance=accepted / drafted if drafted else None))
    return trio.adapter.name, found


def requests(
    tokenizers: Mapping[Role, RoleTokenizer], sampling: Sampling, guided: bool, drafts: int = 0
) -> Iterator[Generate]:
    """Continuations of prompts, without an end, each with a seed of its own. drafts: of the guider, in each window."""
    roles: Sequence[Role] = ROLES if guided or drafts else ("target",)
    for number, prompt in enumerate(prompts()):
        yield Generate(
            request_id=str(number),
            primary="target",
            prompts={role: tokenizers[role].encode(prompt, special=True) for role in roles},
            sampling=replace(sampling, max_tokens=TOKENS, ignore_eos=True),
            guidance=Guidance(alpha=1.0 if guided else 0.0),
            thinking=Thinking(),
            seed=number,
            drafts=drafts,
            drafter="guider",
        )


async def drafts_kept(
    config: ServiceConfig, engines: Mapping[Role, Engine], asked: Sequence[Generate]
) -> tuple[int, int]:
    """The number of drafts that a service verified while it decoded the requests, and of those that it kept.

    Raises Unfinished if a request ends otherwise than by its length.
    """
    drafted = accepted = 0
    async with local_service(config, engines) as service:
        for begin in range(0, len(asked), TOGETHER):
            answers = await asyncio.gather(
                *(decode(service.coordinators[0], request) for request in asked[begin : begin + TOGETHER])
            )
            for end in (answer.end for answer in answers):
                if not isinstance(end, Finished) or end.reason != "length":
                    raise Unfinished(f"a session ended otherwise than by its length: {end}")
                drafted += end.usage.drafted_tokens
                accepted += end.usage.accepted_tokens
    return drafted, accepted


def decoded_rows(lockstep: Lockstep, asked: Iterator[Generate]) -> Generator[Row, None, None]:
    """The rows of sessions that are decoded one after another."""
    for request in asked:
        active = lockstep.open(request)
        try:
            while not active.over:
                step = lockstep.step(active)
                yield step, lockstep.whole_decisions(active)
                lockstep.commit(active, step)
        finally:  # the caller may stop within a session
            lockstep.close(active)


def summary(family: Family, guided: bool, sampling: Sampling, rows: Iterable[Row]) -> RealRows:
    """Count and compare the rows of one case."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in _figures(*row, sampling).items():
            columns.setdefault(name, []).append(value)
    distances = columns.pop("distance")
    means: dict[str, Any] = {name: float(np.mean(values)) for name, values in columns.items()}
    return RealRows(
        family,
        guided,
        sampling.temperature,
        sampling.top_p,
        len(distances),
        tv_mean=float(np.mean(distances)),
        tv_worst=float(np.max(distances)),
        **means,
    )


def _figures(step: Step, whole: Decisions, sampling: Sampling) -> dict[str, float]:
    """Figures of one row by the names of `RealRows`; distance: the total variation."""
    distance, differs = compare(step.final, whole, sampling)
    kept = whole.ids[0][np.isfinite(whole.filtered[0])] if sampling.temperature else whole.tokens
    return {
        "widened": step.widened,
        "whole": step.final.ids.shape == whole.ids.shape,
        "exceeding": not np.isin(kept, step.narrow.ids[0]).all(),
        "unseen": float(step.narrow.outside[0]),
        "uncovered": max(0.0, float(step.narrow.uncovered[0])),
        "uncovered_at_last": max(0.0, float(step.final.uncovered[0])),
        "bytes_per_token": step.final_bytes,
        "narrow_bytes_per_token": step.narrow_bytes,
        "distance": distance,
        "agreement": not differs,
    }


def worst(guider: str, cases: Sequence[RealRows]) -> dict[str, Any]:
    """The benchmark's JSON object: what the guider is, and the worst of each family's cases.

    greedy_agreement: of the rows at temperature 0. tv_mean: of the others.
    """
    by_family = {family: [case for case in cases if case.family == family] for family in FAMILIES}
    return {"guider": guider} | {
        family: {
            "greedy_agreement": min(case.agreement for case in own if not case.temperature),
            "tv_mean": round(max(case.tv_mean for case in own if case.temperature), 6),
            "tv_worst": round(max(case.tv_worst for case in own if case.temperature), 6),
        }
        for family, own in by_family.items()
    }


def table(guider: str, cases: Sequence[RealRows]) -> Table:
    """Every case."""
    shares = ("widened", "whole", "exceed")
    sizes = ("unseen", "uncovered", "at last", "bytes", "narrow bytes")
    compared = ("TV mean", "TV worst", "agree", "drafts kept")
    columns = ("target", "decoded", "T", "top_p", "rows", *shares, *sizes, *compared)
    shown = Table(*columns, title=f"real rows: slices against whole rows; guider: {guider}")
    for case in cases:
        shown.add_row(
            f"{case.family} family",
            "guided" if case.guided else "alone",
            f"{case.temperature:g}",
            f"{case.top_p:g}",
            str(case.rows),
            *(f"{share:.1%}" for share in (case.widened, case.whole, case.exceeding)),
            *(f"{mass:.4f}" for mass in (case.unseen, case.uncovered, case.uncovered_at_last)),
            *(f"{size:,.0f}" for size in (case.bytes_per_token, case.narrow_bytes_per_token)),
            f"{case.tv_mean:.5f}",
            f"{case.tv_worst:.5f}",
            f"{case.agreement:.4f}",
            "" if case.acceptance is None else f"{case.acceptance:.3f}",
        )
    return shown
