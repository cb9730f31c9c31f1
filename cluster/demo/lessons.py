"""Training documents of the trio's models: facts, questions answered at once, and questions answered hop by hop.

The documents have the service's format: a question is a user turn of the chat format, an answer an assistant turn. All
questions are from the training split.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import Tokenizer

from cluster.demo.markup import Markup
from cluster.demo.task import Fact, Question, draw_question
from cluster.demo.tokenizer import MARKUP

FACTS_A_DOCUMENT = 6


@dataclass(frozen=True)
class Piece:
    """A part of a document. learned: True if its tokens count in the loss, because they can be predicted."""

    text: str
    learned: bool


@dataclass(frozen=True)
class Curriculum:
    """A mixture of documents over `facts`. Questions without reasoned answers are answered at once."""

    facts: tuple[Fact, ...]
    fact_share: float
    reasoned_share: float
    max_hops: int
    markup: Markup = MARKUP

    def document(self, draw: random.Random) -> list[Piece]:
        """One document of the mixture."""
        kind = draw.random()
        if kind < self.fact_share:
            return self._recital(draw)
        question = self.question(draw)
        reasoned = kind < self.fact_share + self.reasoned_share
        answer = question.reasoned_answer if reasoned else question.direct_answer
        return [
            Piece(self.markup.prompt(question), False),
            Piece(answer + self.markup.turn_end, True),
            Piece(self.markup.after, False),
        ]

    def _recital(self, draw: random.Random) -> list[Piece]:
        """Facts one after the other, as raw text. Only the last word of each can be predicted."""
        pieces = []
        for number in range(FACTS_A_DOCUMENT):
            fact = draw.choice(self.facts)
            pieces.append(Piece(f" {fact.stem}" if number else fact.stem, False))
            pieces.append(Piece(f" {fact.value}.", True))
        return [*pieces, Piece(self.markup.end_of_text, False)]

    def question(self, draw: random.Random) -> Question:
        """A training question whose steps are all among the facts of this curriculum."""
        hops, known = draw.randint(1, self.max_hops), frozenset(self.facts)
        while True:
            question = draw_question(draw, hops)
            if known.issuperset(question.steps) and question.split == "train":
                return question


class DocumentPacker:
    """Packs the documents of a curriculum into rows of token ids."""

    def __init__(self, tokenizer: Tokenizer, curriculum: Curriculum) -> None:
        self._curriculum = curriculum
        self._encode = lru_cache(maxsize=4096)(lambda text: tuple(tokenizer.encode(text).ids))

    def row(self, draw: random.Random, length: int) -> tuple[list[int], list[bool]]:
        """`length` token ids of documents end to end, the last one truncated, and for each id whether it is learned."""
        ids: list[int] = []
        learned: list[bool] = []
        for piece in self._pieces(draw):
            tokens = self._encode(piece.text)
            ids.extend(tokens)
            learned.extend([piece.learned] * len(tokens))
            if len(ids) >= length:
                break
        return ids[:length], learned[:length]

    def _pieces(self, draw: random.Random) -> Iterator[Piece]:
        while True:
            yield from self._curriculum.document(draw)
