"""Word problems of a few sums, with worked-out solutions: a task that needs steps and hardly any knowledge.

Ana has 12 pens. She buys 7 more pens. Then she gives 5 pens to Tom. How many pens does Ana have now?
Let's think step by step. Ana starts with 12. 12 + 7 = 19. 19 - 5 = 14. The answer is 14.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]
STEPS = (2, 3, 4)  # sums of a problem
MOST = 400  # no number of a problem is larger
_PEOPLE = {
    "She": ("Ana", "Mia", "Zoe", "Lucy", "Emma", "Nora", "Ruth", "Clara", "Ivy", "Sara"),
    "He": ("Tom", "Ben", "Max", "Leo", "Sam", "Jack", "Paul", "Adam", "Hugo", "Karl"),
}
_THINGS = (
    *("pens", "books", "apples", "coins", "cards", "stamps", "eggs", "shells", "beads", "stickers", "marbles"),
    *("cookies", "flowers", "stones", "buttons", "candles", "oranges", "tickets", "photos", "balloons"),
)
_PLACES = ("box", "bag", "jar", "drawer", "basket")
_TIMES = {2: "twice", 3: "three times", 4: "four times"}


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, its solution step by step, and the answer that is right."""

    question: str
    solution: str
    answer: str


def problems(split: Split, steps: Sequence[int] = STEPS) -> Iterator[Problem]:
    """The problems of a split, without end; always the same, and no two splits have a question in common.

    steps: numbers of sums in a problem, all equally likely.
    """
    others = {"train": ("validation", "test"), "validation": ("test",), "test": ()}[split]
    taken = {one.question for other in others for one in _first(other, 1_000)}
    for problem in _drawn(split, steps):
        if problem.question not in taken:
            taken.add(problem.question)
            yield problem


def _first(split: str, count: int) -> Iterator[Problem]:
    for problem, _ in zip(_drawn(split, STEPS), range(count), strict=False):
        yield problem


def _drawn(split: str, steps: Sequence[int]) -> Iterator[Problem]:
    generator = random.Random(f"sums {split}")
    while True:
        yield _problem(generator, generator.choice(steps))


def _problem(generator: random.Random, steps: int) -> Problem:
    """A problem of so many sums."""
    pronoun = generator.choice(tuple(_PEOPLE))
    name = generator.choice(_PEOPLE[pronoun])
    friend = generator.choice([one for people in _PEOPLE.values() for one in people if one != name])
    things, place = generator.choice(_THINGS), generator.choice(_PLACES)
    sums: list[str] = []
    if generator.random() < 0.4:
        number, each = generator.randint(2, 9), generator.randint(2, 9)
        has = number * each
        sentences = [f"{name} has {number} {place}{'es' if place == 'box' else 's'} with {each} {things} each."]
        solution = [f"{number} x {each} = {has}."]
        steps -= 1
    else:
        has = generator.randint(5, 60)
        sentences = [f"{name} has {has} {things}."]
        solution = [f"{name} starts with {has}."]
    while len(sums) < steps:
        sentence, sign, number = _change(generator, has, things, friend)
        result = {"+": has + number, "-": has - number, "x": has * number}[sign]
        if 0 < result <= MOST:
            sentences.append(f"{generator.choice(('Then ', 'Later ', 'After that, '))}{pronoun.lower()} {sentence}.")
            sums.append(f"{has} {sign} {number} = {result}.")
            has = result
    question = f"{' '.join(sentences)} How many {things} does {name} have now?"
    thinking = " ".join(["Let's think step by step.", *solution, *sums, f"The answer is {has}."])
    return Problem(question, thinking, str(has))


def _change(generator: random.Random, has: int, things: str, friend: str) -> tuple[str, str, int]:
    """A change of the number of things: its sentence, and the sign and the second number of its sum."""
    kind, number = generator.choice("+++---x"), generator.randint(2, 40)
    if kind == "x":
        times = generator.choice(tuple(_TIMES))
        return f"collects until there are {_TIMES[times]} as many {things} as before", "x", times
    if kind == "+":
        ways = ("buys {} more {}", "finds {} {}", "gets {} {} from {friend}", "wins {} more {}")
    else:
        ways = ("gives {} {} to {friend}", "loses {} {}", "sells {} {}", "throws {} {} away")
    return generator.choice(ways).format(number, things, friend=friend), kind, number
