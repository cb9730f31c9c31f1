"""The chat format of a model family, and the tokens that a reply of the task takes in it."""

from dataclasses import dataclass

from cluster.demo.task import Question


@dataclass(frozen=True)
class Markup:
    """A family's texts around turns and documents, and bounds of reply lengths in tokens."""

    question: str  # before the user's text
    answer: str  # between the user's text and the assistant's
    turn_end: str  # the assistant's last token
    after: str  # the template's text after it
    end_of_text: str
    tokens_a_hop: int  # limit for one sentence of the thinking
    tokens_around: int  # limit for the marks, the answer and the end together

    def prompt(self, question: Question) -> str:
        """The question as the chat template renders it, up to the beginning of the assistant's turn."""
        return f"{self.question}{question.text}{self.answer}"

    def budget(self, hops: int) -> int:
        """Tokens of the longest reply to a question of `hops` hops."""
        return self.tokens_a_hop * hops + self.tokens_around
