"""Accuracy of the trio, decoded greedily with plain transformers forwards and the formula.

It needs no service. The training job reports it, and the figures of the service can be compared with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from cluster.demo.markup import Markup
from cluster.demo.task import Question, grade
from cluster.demo.tokenizer import MARKUP


@dataclass(frozen=True)
class Term:
    """One summand of the logits: `weight` times the row of `model`."""

    model: PreTrainedModel
    weight: float = 1.0


@torch.no_grad()
def replies(
    terms: Sequence[Term],
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    start: str = "",
    markup: Markup = MARKUP,
) -> list[str]:
    """Greedy replies to `questions`, all of the same hop count, with `start` appended to each prompt.

    Every name and relation is one token, so that prompts of one hop count have equal lengths and need no padding. The
    returned texts begin after `start` and end before the turn's end token.
    """
    inputs = torch.tensor([tokenizer.encode(markup.prompt(question) + start).ids for question in questions])
    end = tokenizer.token_to_id(markup.turn_end)
    assert end is not None
    caches: list[object] = [None] * len(terms)
    finished = torch.zeros(len(questions), dtype=torch.bool)
    columns: list[torch.Tensor] = []
    for _ in range(markup.budget(questions[0].hops)):
        combined = torch.zeros(())
        for number, term in enumerate(terms):
            output = term.model(input_ids=inputs, past_key_values=caches[number], use_cache=True, logits_to_keep=1)
            caches[number] = output.past_key_values
            combined = combined + term.weight * output.logits[:, -1].double()
        chosen = combined.argmax(-1).masked_fill(finished, end)
        finished |= chosen == end
        columns.append(chosen)
        inputs = chosen[:, None]
        if bool(finished.all()):
            break
    rows: list[list[int]] = torch.stack(columns, 1).tolist()
    return [tokenizer.decode(row[: row.index(end)] if end in row else row) for row in rows]


def accuracy(
    terms: Sequence[Term],
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    start: str = "",
    markup: Markup = MARKUP,
) -> float:
    """The share of right answers to `questions`, all of the same hop count."""
    texts = replies(terms, tokenizer, questions, start, markup)
    right = [grade(text, question) for text, question in zip(texts, questions, strict=True)]
    return sum(right) / len(right)


def guided(target: PreTrainedModel, guider: PreTrainedModel, guider_base: PreTrainedModel, alpha: float) -> list[Term]:
    """The terms of z_target + alpha * (z_guider - z_guider_base)."""
    return [Term(target), Term(guider, alpha), Term(guider_base, -alpha)]
