"""Problems on which guidance changed the verdict, with every mode's answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeAlias

from cluster.jobs.results import ProblemRow, Results
from cluster.jobs.sample import Sample
from cluster.jobs.summary import TARGET, Variant

EACH_WAY = 6  # contrasts of a report that were gained, and as many that were lost

_SampleId: TypeAlias = tuple[str, str, int, int]  # task, problem, seed, number


@dataclass(frozen=True, slots=True)
class Contrast:
    """One sample of a problem for which the target's and the guided variant's verdicts differ."""

    problem: ProblemRow
    gained: bool  # True if only the guided answer is right, False if only the target's
    answers: Mapping[Variant, Sample]  # target, guided, guider and guider base, if they ran


def contrasts(results: Results, guided: Variant, each_way: int = EACH_WAY) -> list[Contrast]:
    """At most `each_way` gained and then `each_way` lost contrasts, from each task in turn, first samples first."""
    verdicts: dict[_SampleId, dict[Variant, bool]] = {}
    for sample in results.samples():
        variant = _variant(sample)
        if variant in (TARGET, guided):
            verdicts.setdefault(_sample_id(sample), {})[variant] = sample.right
    differing = {id_: both[guided] for id_, both in verdicts.items() if len(both) == 2 and both[guided] != both[TARGET]}
    chosen = [
        id_
        for gained in (True, False)
        for id_ in _in_turn(id_ for id_, won in differing.items() if won is gained)[:each_way]
    ]
    answers = _answers(results, chosen, guided)
    problems = {(row.task, row.problem): row for row in results.problems()}
    return [
        Contrast(problems[id_[0], id_[1]], differing[id_], dict(sorted(answers[id_].items(), key=_order)))
        for id_ in chosen
    ]


def _answers(results: Results, chosen: Iterable[_SampleId], guided: Variant) -> dict[_SampleId, dict[Variant, Sample]]:
    """The samples of the chosen problems. A second pass over the file, so that other texts need no memory."""
    answers: dict[_SampleId, dict[Variant, Sample]] = {id_: {} for id_ in chosen}
    for sample in results.samples():
        variant = _variant(sample)
        if _sample_id(sample) in answers and (variant.mode != "guided" or variant == guided):
            answers[_sample_id(sample)][variant] = sample
    return answers


def _variant(sample: Sample) -> Variant:
    return Variant(sample.key.mode, sample.key.setting)


def _sample_id(sample: Sample) -> _SampleId:
    key = sample.key
    return key.task, key.problem, key.seed, key.number


def _order(item: tuple[Variant, Sample]) -> int:
    return ("target", "guided", "guider", "guider_base").index(item[0].mode)


def _in_turn(ids: Iterable[_SampleId]) -> list[_SampleId]:
    """The ids with tasks taking turns; within a task, first samples of all problems come before second ones."""
    by_task: dict[str, list[_SampleId]] = {}
    for id_ in sorted(ids, key=lambda id_: (id_[0], id_[3], id_[2], id_[1])):
        by_task.setdefault(id_[0], []).append(id_)
    return [id_ for turn in zip_longest(*by_task.values()) for id_ in turn if id_ is not None]
