"""What guidance gained over the target alone, and whether that is what was expected."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

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
        intervals = {name: each and [round(n, 4) for n in (each.value, each.low, each.high)] for name, each in ends.items()}
        means = {"accuracy": round(self.accuracy, 4), "target": round(self.target, 4)}
        return {"setting": self.setting, "problems": self.problems, **means, **intervals, "p": round(self.p, 5)}


def gains(samples: Iterable[Sample]) -> list[Gain]:
    """Every setting of the guided mode against the target, in the order of their names' first samples."""
    by_arm: dict[tuple[Mode, str], dict[str, dict[str, list[bool]]]] = {}
    for sample in samples:
        key = sample.key
        tasks = by_arm.setdefault((key.mode, key.setting), defaultdict(lambda: defaultdict(list)))
        tasks[key.task][key.problem].append(sample.right)
    target = _rates(by_arm.pop(("target", ALONE), {}))
    found = [_gain(arm[1], _rates(tasks), target) for arm, tasks in by_arm.items() if arm[0] == "guided"]
    kept = [gain for gain in found if gain is not None]
    adjusted = holm([gain.p for gain in kept])
    return [_with_p(gain, p) for gain, p in zip(kept, adjusted, strict=True)]
