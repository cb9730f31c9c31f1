"""What guidance gained over the target alone, and whether that is what was expected."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from cluster.jobs.config import Expectation
from cluster.jobs.sample import ALONE, Mode, Sample
from cluster.jobs.statistics import Floats, Interval, difference, holm, relative_gain, significance

SURE = 0.05  # a p below this is no accident
Rates = Mapping[str, Mapping[str, float]]  # by task and problem: the share of its samples that are right


@dataclass(frozen=True, slots=True)
class Gain:
    """A setting against the target, over the problems that both have answered; tasks count alike.

    difference: of average accuracies. relative: that over the target's accuracy, None where it is 0. p: two-sided, of
    "neither is better", adjusted for the settings that were tried beside it (Holm).
    """

    setting: str
    problems: int
    accuracy: float
    target: float
    difference: Interval
    relative: Interval | None
    p: float

    @property
    def helps(self) -> bool:
        """Whether the gain is no accident."""
        return self.difference.low > 0 and self.p < SURE

    def result(self) -> dict[str, Any]:
        """For the last line's JSON object."""
        ends = {"gain": self.difference, "relative_gain": self.relative}
        intervals = {
            name: each and [round(n, 4) for n in (each.value, each.low, each.high)] for name, each in ends.items()
        }
        means = {"accuracy": round(self.accuracy, 4), "target": round(self.target, 4)}
        return {"setting": self.setting, "problems": self.problems, **means, **intervals, "p": round(self.p, 5)}


def gains(samples: Iterable[Sample]) -> list[Gain]:
    """Every setting of the guided mode against the target, by name."""
    by_arm = _by_arm(samples)
    target = by_arm.get(("target", ALONE), {})
    settings = sorted(setting for mode, setting in by_arm if mode == "guided")
    pairs = {setting: paired(by_arm["guided", setting], target) for setting in settings}
    pairs = {setting: pair for setting, pair in pairs.items() if pair[0]}
    adjusted = holm([significance(*pair) for pair in pairs.values()])
    return [_gain(setting, *pair, p) for (setting, pair), p in zip(pairs.items(), adjusted, strict=True)]


def paired(one: Rates, other: Rates) -> tuple[list[Floats], list[Floats]]:
    """The rates of both for each task, [problems], over the problems that both have."""
    both = {task: sorted(one[task].keys() & other[task].keys()) for task in sorted(one.keys() & other.keys())}
    kept = {task: names for task, names in both.items() if names}
    first, second = ([np.array([rates[task][name] for name in kept[task]]) for task in kept] for rates in (one, other))
    return first, second


def verdict(expected: Expectation, found: Sequence[Gain], console: Console) -> dict[str, Any]:
    """Say "reproduced" or "not", and why; the same for the last line."""
    gain = next((each for each in found if each.setting == expected.setting), None)
    low, high = expected.gain
    relative = gain.relative if gain else None
    inside = relative is not None and low <= relative.value <= high
    reproduced = gain is not None and gain.helps and inside
    measured = (
        f"{relative.value:+.1%} [{relative.low:+.1%}, {relative.high:+.1%}]" if relative else "no gain to speak of"
    )
    sure = "no accident" if gain and gain.helps else "within what chance does"
    console.print(
        f"{'reproduced' if reproduced else 'not'}: {expected.setting} over the target {measured}, {sure}; expected "
        f"{low:+.0%} to {high:+.0%} ({expected.source})",
        highlight=False,
        soft_wrap=True,
    )
    return {"verdict": "reproduced" if reproduced else "not", "expected_gain": [low, high]}


def _by_arm(samples: Iterable[Sample]) -> dict[tuple[Mode, str], Rates]:
    told: dict[tuple[Mode, str], dict[str, dict[str, list[bool]]]] = {}
    for sample in samples:
        key = sample.key
        problems = told.setdefault((key.mode, key.setting), {}).setdefault(key.task, {})
        problems.setdefault(key.problem, []).append(sample.right)
    return {
        arm: {
            task: {name: sum(right) / len(right) for name, right in problems.items()}
            for task, problems in tasks.items()
        }
        for arm, tasks in told.items()
    }


def _gain(setting: str, rates: list[Floats], target: list[Floats], p: float) -> Gain:
    problems = sum(map(len, rates))
    means = _mean(rates), _mean(target)
    return Gain(setting, problems, *means, difference(rates, target), relative_gain(rates, target), p)


def _mean(rates: list[Floats]) -> float:
    return float(np.mean([rate.mean() for rate in rates]))
