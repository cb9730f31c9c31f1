"""Makes preference pairs: a right and a wrong answer to one problem, one of the target and one of the guider.

There are the two kinds of ThinkLogit-DPO (arXiv 2507.12759). `target_right` teaches the guider problems that the target
answers right; `guider_right` preserves those that only the guider answers right. Pairs depend only on the samples and
the configuration.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, TypeAlias, get_args

from pydantic import Field, field_validator

from actors.api.generation import Role
from cluster.jobs.config import Section
from cluster.jobs.sample import Mode, Sample

Kind: TypeAlias = Literal["target_right", "guider_right"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Split: TypeAlias = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = get_args(Split)
SAMPLED: tuple[Mode, ...] = ("target", "guider")  # modes whose answers are paired
CHOSEN: dict[Kind, tuple[Mode, Mode]] = {"target_right": ("target", "guider"), "guider_right": ("guider", "target")}


class Pairing(Section):
    """The `pairs` section: how samples become pairs.

    balanced: make equally many pairs of each kind. most: limit of all kinds and both splits together; the paper used
    about 10,000. per_problem: limit of each kind. min_chosen_tokens: a shorter right answer counts as a guess and is
    never chosen. finished_only: leave out truncated wrong answers. validation: share of problems in the validation
    split. seed: of every choice between samples.
    """

    kinds: tuple[Kind, ...] = Field(KINDS, min_length=1)
    balanced: bool = True
    most: int = Field(10_000, ge=1)
    per_problem: int = Field(4, ge=1)
    min_chosen_tokens: int = Field(0, ge=0)
    finished_only: bool = False
    validation: float = Field(0.1, gt=0, lt=1)
    seed: int = 0

    @field_validator("kinds")
    @classmethod
    def _once(cls, kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
        if len(set(kinds)) < len(kinds):
            raise ValueError("a kind is repeated")
        return kinds


@dataclass(frozen=True, slots=True)
class PromptedProblem:
    """A problem with the prompt of each role. question: the problem's text, by which problems are distinguished."""

    task: str
    id: str
    question: str
    prompts: Mapping[Role, str]


@dataclass(frozen=True, slots=True)
class Pair:
    """A right answer (chosen) and a wrong one (rejected) to a problem."""

    problem: PromptedProblem
    kind: Kind
    chosen: Sample
    rejected: Sample

    def row(self) -> dict[str, Any]:
        """The pair in TRL's plain-text preference format, with more columns for trainers and readers."""
        row: dict[str, Any] = {column("prompt", role): prompt for role, prompt in self.problem.prompts.items()}
        row |= {"chosen": self.chosen.text, "rejected": self.rejected.text}
        for name, sample in (("chosen", self.chosen), ("rejected", self.rejected)):
            row[f"{name}_finished"] = sample.finish == "stop"  # not truncated: training includes the end token
            row[f"{name}_tokens"] = sample.tokens
        return row | {"kind": self.kind, "task": self.problem.task, "problem": self.problem.id}


def column(name: str, role: Role) -> str:
    """The column of a role in a row of pairs. TRL's own columns are the guider's."""
    return name if role == "guider" else f"{role}_{name}"


def pairs(samples: Iterable[Sample], problems: Sequence[PromptedProblem], pairing: Pairing) -> dict[Split, list[Pair]]:
    """The pairs of both splits. No question is in both. samples: of the target and the guider."""
    answers: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        answers[sample.key.task, sample.key.problem].append(sample)
    made: dict[Split, list[Pair]] = {}
    for split in SPLITS:
        share = pairing.validation if split == "validation" else 1 - pairing.validation
        of_split = [one for one in problems if split_of(one.question, pairing) == split]
        kinds = {kind: _of_kind(kind, of_split, answers, pairing) for kind in pairing.kinds}
        made[split] = _chosen(kinds, round(share * pairing.most), pairing.balanced)
    return made


def split_of(question: str, pairing: Pairing) -> Split:
    """The split of all pairs of a question. It depends on the text only: equal questions of two tasks stay together."""
    return "validation" if _draw(pairing.seed, " ".join(question.split())) < pairing.validation else "train"


def _of_kind(
    kind: Kind,
    problems: Sequence[PromptedProblem],
    answers: Mapping[tuple[str, str], Sequence[Sample]],
    pairing: Pairing,
) -> list[Pair]:
    """The pairs of one kind in order of preference: the first pairs of all problems come before the second ones."""
    by_problem = [_of_problem(kind, one, answers.get((one.task, one.id), ()), pairing) for one in problems]
    by_problem.sort(key=lambda made: _draw(pairing.seed, made[0].problem.task, made[0].problem.id) if made else 0.0)
    return [pair for turn in zip_longest(*by_problem) for pair in turn if pair is not None]


def _of_problem(kind: Kind, problem: PromptedProblem, samples: Sequence[Sample], pairing: Pairing) -> list[Pair]:
    """Distinct pairs of distinct texts. If one side has fewer answers, they are paired repeatedly."""
    of_right, of_wrong = CHOSEN[kind]
    right = _distinct(
        (s for s in samples if s.key.mode == of_right and s.right and s.tokens >= pairing.min_chosen_tokens), pairing
    )
    wrong = _distinct(
        (
            s
            for s in samples
            if s.key.mode == of_wrong and not s.right and (s.finish == "stop" or not pairing.finished_only)
        ),
        pairing,
    )
    if not right or not wrong:
        return []
    count = min(pairing.per_problem, max(len(right), len(wrong)))
    return [Pair(problem, kind, right[i % len(right)], wrong[i % len(wrong)]) for i in range(count)]


def _distinct(samples: Iterable[Sample], pairing: Pairing) -> list[Sample]:
    """One sample for each text, in a random order that depends on the seed."""
    by_text: dict[str, Sample] = {}
    for sample in samples:
        by_text.setdefault(sample.text.strip(), sample)
    return sorted(by_text.values(), key=lambda sample: (_draw(pairing.seed, *map(str, sample.key)), sample.key))


def _chosen(kinds: Mapping[Kind, Sequence[Pair]], most: int, balanced: bool) -> list[Pair]:
    """At most `most` pairs, evenly over the kinds as far as possible."""
    if balanced:
        each = min(most // len(kinds), *map(len, kinds.values())) if len(kinds) > 1 else most
        return [pair for made in kinds.values() for pair in made[:each]]
    taken: dict[Kind, int] = dict.fromkeys(kinds, 0)
    left = most
    for place, kind in enumerate(sorted(kinds, key=lambda kind: len(kinds[kind]))):
        taken[kind] = min(len(kinds[kind]), left // (len(kinds) - place))
        left -= taken[kind]
    return [pair for kind, made in kinds.items() for pair in made[: taken[kind]]]


def _draw(seed: int, *words: str) -> float:
    """A pseudo-random number in [0, 1) for these words."""
    digest = hashlib.sha256("\0".join((str(seed), *words)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
