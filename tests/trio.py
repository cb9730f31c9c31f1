"""Requests to the embedded trio, as the router would make them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from actors.coordinator import Coordinator
from actors.decoding.guidance import Guidance
from actors.decoding.parameters import Sampling, Thinking
from actors.requests import ROLES, Finished, Generate, Role
from actors.tokenizer import RoleTokenizer
from benchmarks.local import Answer, decode
from cluster.demo.task import questions

GREEDY = Sampling(temperature=0, max_tokens=48)


def chat_prompts(count: int, hops: int = 2) -> list[str]:
    """Questions of the held-out split."""
    return [question.text for question in questions("held_out", hops, count)]


def request(
    tokenizers: Mapping[Role, RoleTokenizer],
    text: str,
    *,
    sampling: Sampling = GREEDY,
    guidance: Guidance | None = None,
    thinking: Thinking | None = None,
    seed: int = 1,
    primary: Role = "target",
    roles: Sequence[Role] | None = None,
    chat: bool = True,
    explain: bool = False,
) -> Generate:
    """A request for one answer to `text`: a question in the chat template, or raw text to go on with."""
    thinking = thinking or Thinking()
    guidance = guidance or Guidance(1.0 if primary == "target" else 0.0)
    prompts = {}
    for role in roles or (ROLES if primary == "target" else (primary,)):
        tokenizer = tokenizers[role]
        whole = tokenizer.render([{"role": "user", "content": text}]) if chat else text
        prompts[role] = tokenizer.encode(whole + thinking.start)
    return Generate(f"r{seed}", primary, prompts, sampling, guidance, thinking, seed, explain)


async def decode_all(coordinator: Coordinator, requests: Sequence[Generate]) -> list[Answer]:
    """Run requests side by side."""
    return await asyncio.gather(*(decode(coordinator, one) for one in requests))


def tokens(answers: Sequence[Answer]) -> list[list[int]]:
    """What was generated; every answer must have ended well."""
    for answer in answers:
        assert isinstance(answer.end, Finished)
        assert answer.end.reason in ("stop", "length"), answer.end
    return [answer.tokens for answer in answers]


def finished(answer: Answer) -> Finished:
    """The end of an answer that was taken on."""
    end: Any = answer.end
    assert isinstance(end, Finished), end
    return end
