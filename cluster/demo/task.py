"""The task of the embedded trio: questions of several hops over a table of facts about people.

Between forty-eight people there are four relations. Each relation leads from a person to exactly one other person.
"Who is the mentor of the rival of Ada?" takes two hops. It can be answered at once or hop by hop inside
``<think>...</think>``. All of it follows from fixed seeds; nothing here depends on Python's salted ``hash``.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

_NAMES = """
Ada Ben Cleo Dan Eva Finn Gus Hana Ivan June Kai Lena Max Nora Omar Pia Quinn Rosa Sam Tara Uma Vera Will Xena Yara Zoe
Alan Bella Carl Dora Emil Flora Greta Hugo Iris Jack Kira Leo Mia Nils Olga Paul Ruth Seth Tess Ursula Victor Wanda
"""
PEOPLE = tuple(_NAMES.split())
RELATIONS = ("mentor", "rival", "neighbour", "doctor")
MAX_HOPS = 6  # 196,608 questions, all of which `questions` may have to visit

Split = Literal["train", "validation", "held_out"]
SPLITS: tuple[Split, ...] = get_args(Split)

_TABLE_SEED = 7
_KNOWN_SHARE = 0.6
_TRAIN_SHARE, _VALIDATION_SHARE = 0.60, 0.15  # the rest is held out
_THINK_START, _THINK_END = "<think>", "</think>"
_ANSWER = re.compile(r"\s*(?:The answer is )?([A-Z][a-z]+)\.\s*")


@dataclass(frozen=True)
class Fact:
    """One entry of the table: the `relation` of `person` is `value`."""

    relation: str
    person: str
    value: str

    @property
    def stem(self) -> str:
        """The sentence without its last word, which only the table determines: ``The rival of Ada is``."""
        return f"The {self.relation} of {self.person} is"

    @property
    def sentence(self) -> str:
        return f"{self.stem} {self.value}."


@dataclass(frozen=True)
class Question:
    """A question for the person that `relations`, followed in their order, lead to from `person`."""

    person: str
    relations: tuple[str, ...]

    @property
    def hops(self) -> int:
        return len(self.relations)

    @property
    def text(self) -> str:
        """The question in English, in which the first relation comes last."""
        return "Who is " + "".join(f"the {relation} of " for relation in reversed(self.relations)) + f"{self.person}?"

    @property
    def steps(self) -> tuple[Fact, ...]:
        """The facts that lead to the answer, in the order in which they are needed."""
        steps, person = [], self.person
        for relation in self.relations:
            steps.append(fact(relation, person))
            person = steps[-1].value
        return tuple(steps)

    @property
    def answer(self) -> str:
        """The right name."""
        return self.steps[-1].value

    @property
    def thinking(self) -> str:
        """One sentence per hop, without the marks around it."""
        return " ".join(step.sentence for step in self.steps)

    @property
    def direct_answer(self) -> str:
        return f"The answer is {self.answer}."

    @property
    def reasoned_answer(self) -> str:
        return f"{_THINK_START}{self.thinking}{_THINK_END}{self.direct_answer}"

    @property
    def split(self) -> Split:
        """The split of this question, which a stable hash of its text determines."""
        digest = hashlib.sha256(self.text.encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        if place < _TRAIN_SHARE:
            return "train"
        return "validation" if place < _TRAIN_SHARE + _VALIDATION_SHARE else "held_out"


@cache
def table() -> dict[tuple[str, str], Fact]:
    """All 192 facts by (relation, person). No relation leads from a person to the same person."""
    draw = random.Random(_TABLE_SEED)
    facts = {}
    for relation in RELATIONS:
        for person in PEOPLE:
            value = draw.choice([other for other in PEOPLE if other != person])
            facts[relation, person] = Fact(relation, person, value)
    return facts


def fact(relation: str, person: str) -> Fact:
    """The fact about `person`. Raises KeyError for a relation or person that the table lacks."""
    return table()[relation, person]


@cache
def known_facts() -> tuple[Fact, ...]:
    """The 60 % of the facts on which the small models are trained; the target is trained on all of them."""
    facts = list(table().values())
    random.Random(_TABLE_SEED + 1).shuffle(facts)
    return tuple(facts[: int(_KNOWN_SHARE * len(facts))])


def draw_question(draw: random.Random, hops: int) -> Question:
    """A random question of `hops` hops of any split."""
    return Question(draw.choice(PEOPLE), tuple(draw.choice(RELATIONS) for _ in range(hops)))


def questions(split: Split, hops: int, n: int, seed: int = 0) -> list[Question]:
    """`n` different questions of `hops` hops from `split`, in an order that depends on `seed`.

    A larger `n` extends the list of a smaller one. Raises ValueError for an unknown split or hop count, and if the
    split has fewer than `n` questions.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    if not 1 <= hops <= MAX_HOPS:
        raise ValueError(f"hops must lie in 1..{MAX_HOPS}, not {hops}")
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    chosen: list[Question] = []
    for question in _shuffled(hops, seed):
        if len(chosen) == n:
            return chosen
        if question.split == split:
            chosen.append(question)
    if len(chosen) < n:
        raise ValueError(f"{split} holds {len(chosen)} questions of {hops} hops, {n} were asked for")
    return chosen


def _shuffled(hops: int, seed: int) -> Iterator[Question]:
    """Every question of `hops` hops once. The digits of a number encode the person and the relations."""
    total = len(PEOPLE) * len(RELATIONS) ** hops
    for number in random.Random(seed).sample(range(total), total):
        rest, person = divmod(number, len(PEOPLE))
        relations = []
        for _ in range(hops):
            rest, relation = divmod(rest, len(RELATIONS))
            relations.append(RELATIONS[relation])
        yield Question(PEOPLE[person], tuple(relations))


def answer_in(text: str) -> str | None:
    """The answer at the end of `text`, a whole reply with or without its thinking; None if it has no answer.

    Only the text after the last ``</think>`` counts. It must be one finished answer ("The answer is Ben." or "Ben."),
    so that a truncated reply, one that is still thinking, and one that names several people have none.
    """
    found = _ANSWER.fullmatch(text.rpartition(_THINK_END)[2])
    return found.group(1) if found else None


def grade(text: str, question: Question) -> bool:
    """True if `text`, a whole reply with or without its thinking, ends in the right answer (see `answer_in`)."""
    return answer_in(text) == question.answer
