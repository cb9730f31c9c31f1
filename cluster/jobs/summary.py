"""The figures of a run: accuracy, cost and reasoning behaviours of each variant, by task and on average.

A variant is a mode at a setting. Tasks have equal weight in the average. A variant is compared with the target on the
problems that both have answered, so that the report of an unfinished run is fair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from actors.api.generation import ROLES, Role
from actors.config import ModelConfig
from cluster.jobs.behaviours import Behaviours, behaviours
from cluster.jobs.results import Results, RunError
from cluster.jobs.sample import ALONE, MODES, Mode, Sample
from cluster.jobs.statistics import (
    Floats,
    Interval,
    difference,
    holm,
    majority_at_k,
    pass_at_1,
    pass_at_k,
    relative_gain,
    significance,
)

AVERAGE = "average"  # in place of a task's name


class Variant(NamedTuple):
    """A mode at a setting."""

    mode: Mode
    setting: str = ALONE

    def __str__(self) -> str:
        return self.mode.replace("_", " ") + ("" if self.setting == ALONE else f" {self.setting}")


TARGET = Variant("target")


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one answer, as means over all samples."""

    tokens: float
    reasoning_tokens: float
    truncated: float  # share of answers that reached the limit of tokens
    guided: float  # share of tokens with guidance
    changed: float  # share of tokens for which the target alone would have chosen another
    seconds: float | None  # from request to last token at the run's concurrency; None: not recorded
    gpu_seconds: float | None  # seconds x GPUs of the participating roles; None: on CPU, or unknown


@dataclass(frozen=True, slots=True)
class Score:
    """A variant on a task, or on average. `gain`, `difference` and `p` compare it with the target."""

    variant: Variant
    problems: int
    samples: int
    pass_at_1: Interval
    pass_at: Mapping[int, float]  # by k
    majority_at: Mapping[int, float]  # by k
    gain: Interval | None  # relative: 0.1 is 10 % more right answers
    difference: Interval | None  # absolute, in [-1, 1]
    p: float | None  # of steered variants, two-sided, adjusted (Holm) for all of them in the run
    cost: Cost
    behaviours: Behaviours

    def per_right(self, amount: float | None) -> float | None:
        """An amount for each answer as an amount for each right answer; None if no answer is right."""
        return None if amount is None or not self.pass_at_1.value else amount / self.pass_at_1.value

    @property
    def steered(self) -> bool:
        """True if any token was guided."""
        return self.cost.guided > 0


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of a run. scores: by task, and AVERAGE if there are several; variants in the order of modes."""

    scores: Mapping[str, tuple[Score, ...]]
    samples: int
    expected: int | None  # samples of the whole run; None if config.yaml lacks them
    gpus: Mapping[Role, float] | None  # of one replica of each role; None if config.yaml lacks them
    concurrency: int | None  # concurrent answers, as configured

    @property
    def overall(self) -> tuple[Score, ...]:
        """The scores of the average, or of the only task."""
        return self.scores[AVERAGE] if AVERAGE in self.scores else next(iter(self.scores.values()))

    def score(self, variant: Variant, task: str | None = None) -> Score | None:
        """The score of a variant on a task; overall if `task` is None."""
        scores = self.overall if task is None else self.scores[task]
        return next((score for score in scores if score.variant == variant), None)

    @property
    def steered(self) -> list[Score]:
        """The variants with guided tokens. At alpha 0 there are none, so it does not count as a comparison."""
        return [score for score in self.overall if score.steered]

    @property
    def best(self) -> Score | None:
        """The guided variant with the largest overall difference to the target, or with the highest accuracy if the
        target did not run. In an unfinished run variants have answered different problems, so that only differences
        are fair."""
        return max(self.steered, key=lambda score: (score.difference or score.pass_at_1).value, default=None)


@dataclass(slots=True)
class _Tally:
    """Accumulates one variant on one task while samples are read. Texts are counted and then dropped."""

    answers: dict[str, list[tuple[str | None, bool]]] = field(default_factory=dict)  # by problem
    sums: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    gpu_seconds: list[float] = field(default_factory=list)
    behaviours: Behaviours = field(default_factory=Behaviours)

    def add(self, sample: Sample, seconds: float | None, gpus: float) -> None:
        self.answers.setdefault(sample.key.problem, []).append((sample.extracted, sample.right))
        self.sums["samples"] += 1
        self.sums["truncated"] += sample.finish == "length"
        for name in ("tokens", "reasoning_tokens", "guided_tokens", "changed_tokens"):
            self.sums[name] += getattr(sample, name)
        if seconds is not None:
            self.seconds.append(seconds)
            self.gpu_seconds.append(seconds * gpus)
        self.behaviours += behaviours(sample.text)

    def cost(self, on_gpu: bool) -> Cost:
        count, tokens = self.sums["samples"], max(1, self.sums["tokens"])
        return Cost(
            tokens=self.sums["tokens"] / count,
            reasoning_tokens=self.sums["reasoning_tokens"] / count,
            truncated=self.sums["truncated"] / count,
            guided=self.sums["guided_tokens"] / tokens,
            changed=self.sums["changed_tokens"] / tokens,
            seconds=float(np.mean(self.seconds)) if self.seconds else None,
            gpu_seconds=float(np.mean(self.gpu_seconds)) if self.gpu_seconds and on_gpu else None,
        )

    def rates(self, problems: Iterable[str]) -> Floats:
        """The share of right answers of each problem."""
        return np.array([np.mean([right for _, right in self.answers[problem]]) for problem in problems])

    def at_k(self) -> tuple[dict[int, float], dict[int, float]]:
        """pass@k and maj@k for the ks for which all problems have samples: powers of two, and the largest k."""
        most = min(len(answers) for answers in self.answers.values())
        ks = sorted({most} | {2**power for power in range(most.bit_length()) if 2**power <= most})
        passed, voted = {}, {}
        for k in ks:
            problems = [list(zip(*answers, strict=True)) for answers in self.answers.values()]
            passed[k] = float(np.mean([pass_at_k(len(right), sum(right), k) for _, right in problems]))
            voted[k] = float(np.mean([majority_at_k(texts, right, k) for texts, right in problems]))
        return passed, voted


_Tallies = dict[str, dict[Variant, _Tally]]  # by task


def summarise(results: Results) -> Summary:
    """The figures of a run. Raises RunError if it has no sample."""
    config = results.config()
    gpus = role_gpus(config)
    tallies = _tallies(results, gpus)
    if not tallies:
        raise RunError(f"{results.folder} holds no samples yet")
    on_gpu = bool(gpus and any(gpus.values()))
    scores = {task: _scores({task: row}, on_gpu) for task, row in tallies.items()}
    if len(tallies) > 1:
        scores[AVERAGE] = _scores(tallies, on_gpu)
    samples = sum(tally.sums["samples"] for row in tallies.values() for tally in row.values())
    concurrency = (config.get("evaluation") or {}).get("concurrency")
    return Summary(scores, samples, _expected(results, config, tallies), gpus, concurrency)


def role_gpus(config: Mapping[str, Any]) -> dict[Role, float] | None:
    """GPUs of one replica of each role, from the run's `service` section; None without such a section."""
    service = config.get("service")
    if not isinstance(service, Mapping):
        return None
    models = {role: ModelConfig.model_validate(service["models"][role]) for role in ROLES}
    return {role: model.num_gpus * model.tensor_parallel for role, model in models.items()}


def _tallies(results: Results, gpus: Mapping[Role, float] | None) -> _Tallies:
    """The tallies by task and variant, both in the order of the report."""
    seconds = {timing.key: timing.seconds for timing in results.timings()}
    tallies: _Tallies = {}
    for sample in results.samples():
        key = sample.key
        tally = tallies.setdefault(key.task, {}).setdefault(Variant(key.mode, key.setting), _Tally())
        tally.add(sample, seconds.get(key), sum((gpus or {}).get(role, 0.0) for role in _roles(sample)))
    order = {mode: place for place, mode in enumerate(MODES)}
    return {
        task: dict(sorted(tallies[task].items(), key=lambda item: (order[item[0].mode], item[0].setting)))
        for task in sorted(tallies)
    }


def _roles(sample: Sample) -> Sequence[Role]:
    """The roles that took part in a sample: the small models only if they guided it."""
    if sample.key.mode == "guided":
        return ROLES if sample.guided_tokens else ("target",)
    return (sample.key.mode,)


def _expected(results: Results, config: Mapping[str, Any], tallies: _Tallies) -> int | None:
    """Samples of the whole run, for the variants that have begun."""
    tasks, seeds = config.get("tasks"), (config.get("evaluation") or {}).get("seeds")
    if not isinstance(tasks, Mapping) or not seeds:
        return None
    variants = {variant for row in tallies.values() for variant in row}
    runs = {task: int(tasks[task]["samples"]) * len(seeds) for task in tasks}
    return sum(runs[row.task] * len(variants) for row in results.problems())


def _scores(tallies: _Tallies, on_gpu: bool) -> tuple[Score, ...]:
    """The score of every variant over the given tasks; if a variant lacks some of them, over the others."""
    variants = dict.fromkeys(variant for row in tallies.values() for variant in row)
    scores = [_score(variant, tallies, on_gpu) for variant in variants]
    compared = [place for place, score in enumerate(scores) if score.p is not None]
    for place, p in zip(compared, holm([scores[place].p or 0.0 for place in compared]), strict=True):
        scores[place] = replace(scores[place], p=p)
    return tuple(scores)


def _score(variant: Variant, tallies: _Tallies, on_gpu: bool) -> Score:
    """The score of one variant, with `p` not yet adjusted."""
    own = [row[variant] for row in tallies.values() if variant in row]
    passed, voted = zip(*(tally.at_k() for tally in own), strict=True)
    rates, baseline = _paired(variant, tallies)
    compared, cost = bool(rates) and variant != TARGET, _mean_cost([tally.cost(on_gpu) for tally in own])
    return Score(
        variant=variant,
        problems=sum(len(tally.answers) for tally in own),
        samples=sum(tally.sums["samples"] for tally in own),
        pass_at_1=pass_at_1([tally.rates(sorted(tally.answers)) for tally in own]),
        pass_at=_common_means(passed),
        majority_at=_common_means(voted),
        gain=relative_gain(rates, baseline) if compared else None,
        difference=difference(rates, baseline) if compared else None,
        p=significance(rates, baseline) if compared and cost.guided else None,
        cost=cost,
        behaviours=sum((tally.behaviours for tally in own), Behaviours()),
    )


def _paired(variant: Variant, tallies: _Tallies) -> tuple[list[Floats], list[Floats]]:
    """Rates of the variant and the target on the problems that both have answered, one array for each task."""
    rates, baseline = [], []
    for row in tallies.values():
        if variant in row and TARGET in row:
            both = sorted(row[variant].answers.keys() & row[TARGET].answers.keys())
            if both:
                rates.append(row[variant].rates(both))
                baseline.append(row[TARGET].rates(both))
    return rates, baseline


def _common_means(by_k: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Means over tasks, for the ks that all tasks have."""
    common = set.intersection(*(set(values) for values in by_k))
    return {k: float(np.mean([values[k] for values in by_k])) for k in sorted(common)}


def _mean_cost(costs: Sequence[Cost]) -> Cost:
    """Means over tasks; None for a field that is None on one of them."""
    means = {}
    for name in Cost.__dataclass_fields__:
        values = [getattr(cost, name) for cost in costs]
        means[name] = None if None in values else float(np.mean(values))
    return Cost(**means)  # type: ignore[arg-type]  # only optional fields are None
