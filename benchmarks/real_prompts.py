"""Prompts for published models: the beginnings of texts of several kinds, and sums in words."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import cycle, islice

from cluster.real.sums import Problem, problems

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


def prompts(seed: int = 0) -> Iterator[str]:
    """Sums and texts in turn, without an end. No sum comes twice in practice; the texts repeat after 16."""
    draw, drawn = random.Random(seed), list(islice(problems("train"), 1_000))
    for text in cycle(TEXTS):
        yield sums(draw.sample(drawn, 3))
        yield text


def sums(drawn: Sequence[Problem]) -> str:
    """Problems with their solutions, and a last one that is to be solved."""
    worked = [f"Question: {one.question}\nAnswer: {one.solution}" for one in drawn[:-1]]
    return "\n\n".join([*worked, f"Question: {drawn[-1].question}\nAnswer:"])
