"""Rows of published models, decided from slices by the service's own exchange and compared with whole rows.

SmolLM2-135M-Instruct with a perturbed copy of itself as guider is a pair of one family. Gemma 3 270M as target of that
pair is another family. `python -m cluster.real --fetch` brings both models. Each session continues a prompt, so the
rows are those that users' requests meet. Called by `python -m benchmarks.fidelity --real --rows N`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from safetensors.torch import load_file, save_file

from actors.api.generation import ROLES, Generate, Role
from actors.api.guidance import Guidance
from actors.api.sampling_params import Sampling, Thinking
from actors.config import ServiceConfig, load_config
from actors.decoding.decision import Decisions, compare
from actors.preflight import load_tokenizers
from actors.text.tokenizer import RoleTokenizer
from benchmarks.lockstep import Lockstep, Step
from benchmarks.results_file import console, progress
from cluster.real.models import GEMMA3, SMOLLM2, RealModelError, fetched
from tests.support.local_service import load_engines

SAMPLINGS = (Sampling(temperature=0.6, top_p=0.95), Sampling(temperature=1.0, top_p=0.95), Sampling(temperature=0.0))
NOISE = 0.03  # of the standard deviation of each weight matrix: the guider's difference from its base
TOKENS = 50  # of each session
PROMPTS = (
    "The ship left the harbour at dawn, and the captain",
    "Question: A farmer has 17 sheep and buys 5 more. How many sheep does he have?\nAnswer:",
    "def median(values: list[float]) -> float:\n",
    "In the nineteenth century, railways changed how people",
    "The three main causes of the war were",
    "Dear Ms Novak,\n\nthank you for your letter of",
    "To make bread at home, you need",
    "Photosynthesis is the process by which",
    "She opened the letter and read it twice. Then she",
    "Prove that the sum of two even numbers is even.\nProof:",
    "The city of Lisbon lies on",
    "1, 1, 2, 3, 5, 8,",
)


@dataclass(frozen=True, slots=True)
class RealRows:
    """Rows of one trio at one sampling. Shares are of all rows.

    widened: rows that fetched more than the first slices. whole: rows that fetched whole rows. exceeding: rows whose
    nucleus, taken from the whole row, holds ids outside the first candidates. tv_mean, tv_worst: total variation
    between the distributions that the token is drawn from. agreement: rows whose token equals that of whole rows.
    """

    family: str
    guided: bool
    temperature: float
    top_p: float
    rows: int
    widened: float
    whole: float
    exceeding: float
    tv_mean: float
    tv_worst: float
    agreement: float


Row = tuple[Step, Decisions]  # a step, and its decisions from whole rows


def measure(rows: int) -> list[RealRows]:
    """All cases with `rows` rows each. Raises RealModelError if a model has not been fetched."""
    small, large = fetched(SMOLLM2), fetched(GEMMA3)
    if small is None or large is None:
        raise RealModelError("the real models are not here: run `python -m cluster.real --fetch`")
    found = []
    with tempfile.TemporaryDirectory() as name, progress(console()) as bar:
        guider = perturbed_copy(small, Path(name) / "guider")
        for family, target in (("same", small), ("other", large)):
            config = trio(target, guider, small)
            tokenizers, engines = load_tokenizers(config), load_engines(config)
            for guided in (False, True):
                for sampling in SAMPLINGS:
                    label = f"{family} family, {'guided' if guided else 'alone'}, T {sampling.temperature:g}"
                    task = bar.add_task(label, total=rows)
                    lockstep = Lockstep(config, tokenizers, engines)
                    decoded = islice(decoded_rows(lockstep, requests(tokenizers, sampling, guided)), rows)
                    found.append(summary(family, guided, sampling, bar.track(decoded, task_id=task)))
    return found


def trio(target: Path, guider: Path, guider_base: Path) -> ServiceConfig:
    """The configuration of three models in float32."""
    paths = {"target": target, "guider": guider, "guider_base": guider_base}
    each = {"dtype": "float32", "device": "cpu", "cache_tokens": 1_024, "max_position": 512}
    models = {role: {"path": str(path)} | each for role, path in paths.items()}
    return load_config({"version": 1, "models": models, "exchange": {"audit_every": 0}})


def perturbed_copy(model: Path, folder: Path) -> Path:
    """A copy of a model with noise on every weight matrix, from a fixed seed."""
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(file)
    for tensor in tensors.values():
        if tensor.dim() > 1:
            tensor += NOISE * tensor.std() * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, file, {"format": "pt"})
    return folder


def requests(tokenizers: Mapping[Role, RoleTokenizer], sampling: Sampling, guided: bool) -> Iterator[Generate]:
    """Continuations of every prompt, again and again with other seeds."""
    roles: Sequence[Role] = ROLES if guided else ("target",)
    for number, prompt in enumerate(cycle(PROMPTS)):
        yield Generate(
            request_id=str(number),
            primary="target",
            prompts={role: tokenizers[role].encode(prompt, special=True) for role in roles},
            sampling=replace(sampling, max_tokens=TOKENS, ignore_eos=True),
            guidance=Guidance(alpha=1.0 if guided else 0.0),
            thinking=Thinking(),
            seed=number,
        )


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


def summary(family: str, guided: bool, sampling: Sampling, rows: Iterable[Row]) -> RealRows:
    """Count and compare the rows of one case."""
    widened, from_whole, exceeding, distances, agreeing = [], [], [], [], []
    for step, whole in rows:
        distance, differs = compare(step.final, whole, sampling)
        kept = whole.ids[0][np.isfinite(whole.filtered[0])] if sampling.temperature else whole.tokens
        exceeding.append(not np.isin(kept, step.narrow.ids[0]).all())
        widened.append(step.widened)
        from_whole.append(step.final.ids.shape == whole.ids.shape)
        distances.append(distance)
        agreeing.append(not differs)
    return RealRows(
        family,
        guided,
        sampling.temperature,
        sampling.top_p,
        len(distances),
        float(np.mean(widened)),
        float(np.mean(from_whole)),
        float(np.mean(exceeding)),
        float(np.mean(distances)),
        float(np.max(distances)),
        float(np.mean(agreeing)),
    )


def table(cases: Sequence[RealRows]) -> Table:
    """Every case."""
    columns = ("target", "decoded", "T", "top_p", "rows", "widened", "whole", "exceed", "TV mean", "TV worst", "agree")
    shown = Table(*columns, title="real rows: slices against whole rows")
    for case in cases:
        shown.add_row(
            f"{case.family} family",
            "guided" if case.guided else "alone",
            f"{case.temperature:g}",
            f"{case.top_p:g}",
            str(case.rows),
            *(f"{share:.1%}" for share in (case.widened, case.whole, case.exceeding)),
            f"{case.tv_mean:.5f}",
            f"{case.tv_worst:.5f}",
            f"{case.agreement:.4f}",
        )
    return shown
