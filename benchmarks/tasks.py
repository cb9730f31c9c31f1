"""Tasks to decode: made-up prompts and answers of mixed length, or the trio's questions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actors.api.generation import ROLES
from actors.config import ServiceConfig
from actors.preflight import load_tokenizers
from benchmarks.baselines import Task
from benchmarks.shapes import Shape, spread
from cluster.demo.task import questions
from cluster.demo.tokenizer import MARKUP

HOPS = (2, 3, 4, 5)
ANSWER = 3  # tokens of a question's answer around its hops, about


def tasks(
    shape: Shape, config: ServiceConfig, sessions: int, context: int, tokens: int, variety: int = 0
) -> list[Task]:
    """One task a session; lengths of prompts and answers are mixed where there are several, `context` and `tokens`
    being their means. The trio is asked its questions, and answers as long as they need. Another `variety` gives other
    texts of the same lengths."""
    if shape.target is None:
        return _questions(config, sessions, variety)
    lengths, draw = np.random.default_rng(sessions), np.random.default_rng((sessions, variety))
    prompts, answers = (lengths.permutation(spread(mean, sessions)).tolist() for mean in (context, tokens))
    return [
        Task(dict.fromkeys(ROLES, draw.integers(shape.common, size=prompt).tolist()), answer)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _questions(config: ServiceConfig, sessions: int, variety: int) -> list[Task]:
    tokenizers = load_tokenizers(config)
    each = -(-sessions // len(HOPS))
    asked = {hops: questions("held_out", hops, each, seed=variety) for hops in HOPS}
    made = []
    for number in range(sessions):
        hops = HOPS[number % len(HOPS)]
        question = asked[hops][number // len(HOPS)]
        messages = [{"role": "user", "content": question.text}]
        prompts = {role: tokenizer.encode(tokenizer.render(messages)) for role, tokenizer in tokenizers.items()}
        made.append(Task(prompts, MARKUP.tokens_a_hop * hops + ANSWER))
    return made


def first(tasks: Sequence[Task], tokens: int) -> list[Task]:
    """The same tasks with answers of at most `tokens` tokens."""
    return [Task(task.prompts, min(task.tokens, tokens)) for task in tasks]
