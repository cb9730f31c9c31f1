"""Prompts for published models: the beginnings of texts of several kinds, and sums in words."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count, cycle

TEXTS = (
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
    "Q: Why is the sky blue?\nA:",
    "<h1>Opening hours</h1>\n<ul>\n<li>",
    "The committee met on Tuesday to discuss",
    "Translate into French: The cat sleeps.\nFrench:",
)
_NAMES = ("Ada", "Ben", "Carla", "David", "Elif", "Femi", "Greta", "Hiro")
_THINGS = ("apples", "stamps", "marbles", "books", "shells", "tickets", "pencils", "coins")


def prompts(seed: int = 0) -> Iterator[str]:
    """Sums and texts in turn, without an end. No sum comes twice in practice; the texts repeat after 16."""
    for number, text in zip(count(), cycle(TEXTS)):
        yield sums(random.Random(f"{seed}-{number}"))
        yield text


def sums(draw: random.Random) -> str:
    """Two worked questions and one that is to be answered. The right answers of all three are positive."""
    worked = "\n\n".join(f"{question} {answer}" for question, answer in (_question(draw) for _ in range(2)))
    return f"{worked}\n\n{_question(draw)[0]}"


def _question(draw: random.Random) -> tuple[str, str]:
    """A question, and its worked answer."""
    name, thing = draw.choice(_NAMES), draw.choice(_THINGS)
    has, more, gone = draw.randint(11, 60), draw.randint(3, 30), draw.randint(2, 10)
    question = (
        f"Question: {name} has {has} {thing}, gets {more} more and gives {gone} away. "
        f"How many {thing} does {name} have now?\nAnswer:"
    )
    total = has + more
    return question, f"{has} + {more} = {total}. {total} - {gone} = {total - gone}. The answer is {total - gone}."
