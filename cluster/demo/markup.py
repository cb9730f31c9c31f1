"""How a family of models writes a chat, and how many tokens of its tokenizer a reply of the task takes."""

from dataclasses import dataclass

from cluster.demo.task import Question


@dataclass(frozen=True)
class Markup:
    """The texts of a family around turns and documents."""

    question: str  # before what a user says
    answer: str  # between that and what the assistant says
    turn_end: str  # the assistant's last token
    after: str  # what the template writes behind it
    end_of_text: str
    tokens_a_hop: int  # of a sentence of the thinking, at most
    tokens_around: int  # of the marks, the answer and the end

    def prompt(self, question: Question) -> str:
        """The question as the chat template renders it, up to where the assistant begins."""
        return f"{self.question}{question.text}{self.answer}"

    def budget(self, hops: int) -> int:
        """Tokens of the longest reply to a question of so many hops."""
        return self.tokens_a_hop * hops + self.tokens_around
