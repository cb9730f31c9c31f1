"""Problems on which guidance changed the verdict, with what every mode said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeAlias

from cluster.jobs.results import ProblemRow, Results
from cluster.jobs.sample import Sample
from cluster.jobs.summary import TARGET, Variant

EACH_WAY = 6  # contrasts of a report: so many that were gained, so many that were lost

_Asking: TypeAlias = tuple[str, str, int, int]  # task, problem, seed, number


@dataclass(frozen=True, slots=True)
class Contrast:
    """One problem, asked once: target and guided variant differ in verdict."""

    problem: ProblemRow
    gained: bool  # right by guidance; else lost by it
    answers: Mapping[Variant, Sample]  # target, guider, guider base as far as they ran, guided


def contrasts(results: Results, guided: Variant, each_way: int = EACH_WAY) -> list[Contrast]:
    """Of each task in turn, first those that guidance gained; first samples first."""
    verdicts: dict[_Asking, dict[Variant, bool]] = {}
    for sample in results.samples():
        variant = _variant(sample)
        if variant in (TARGET, guided):
            verdicts.setdefault(_asking(sample), {})[variant] = sample.right
    differing = {
        asking: both[guided] for asking, both in verdicts.items() if len(both) == 2 and both[guided] != both[TARGET]
    }
    chosen = [
        asking
        for gained in (True, False)
        for asking in _in_turn(asking for asking, won in differing.items() if won is gained)[:each_way]
    ]
    answers = _answers(results, chosen, guided)
    problems = {(row.task, row.problem): row for row in results.problems()}
    return [
        Contrast(problems[asking[0], asking[1]], differing[asking], dict(sorted(answers[asking].items(), key=_order)))
        for asking in chosen
    ]


def _answers(results: Results, chosen: Iterable[_Asking], guided: Variant) -> dict[_Asking, dict[Variant, Sample]]:
    """The second reading: the texts of what was chosen, and of no more."""
    answers: dict[_Asking, dict[Variant, Sample]] = {asking: {} for asking in chosen}
    for sample in results.samples():
        variant = _variant(sample)
        if _asking(sample) in answers and (variant.mode != "guided" or variant == guided):
            answers[_asking(sample)][variant] = sample
    return answers


def _variant(sample: Sample) -> Variant:
    return Variant(sample.key.mode, sample.key.setting)


def _asking(sample: Sample) -> _Asking:
    key = sample.key
    return key.task, key.problem, key.seed, key.number


def _order(item: tuple[Variant, Sample]) -> int:
    return ("target", "guided", "guider", "guider_base").index(item[0].mode)


def _in_turn(askings: Iterable[_Asking]) -> list[_Asking]:
    """One of each task in turn; within a task each problem's first sample before any second."""
    by_task: dict[str, list[_Asking]] = {}
    for asking in sorted(askings, key=lambda asking: (asking[0], asking[3], asking[2], asking[1])):
        by_task.setdefault(asking[0], []).append(asking)
    return [asking for turn in zip_longest(*by_task.values()) for asking in turn if asking is not None]
