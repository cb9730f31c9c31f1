"""Requests to the embedded trio, as the router makes them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from actors.api.generation import ROLES, Finished, Generate, Role
from actors.api.guidance import Guidance
from actors.api.sampling_params import Sampling, Thinking
from actors.coordinator.coordinator import Coordinator
from actors.text.tokenizer import RoleTokenizer
from cluster.demo.task import questions
from tests.support.local_service import Answer, LocalService, decode

GREEDY = Sampling(temperature=0, max_tokens=48)
SAMPLED = Sampling(temperature=1.0, max_tokens=30)
LONG = Sampling(temperature=1.0, ignore_eos=True, max_tokens=400)
TEXT = "Who is the mentor of the rival of Ada?"


def chat_prompts(count: int, hops: int = 2) -> list[str]:
    """Questions from the held-out split."""
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


def mixed_requests(service: LocalService, count: int) -> list[Generate]:
    """Requests with different questions, ways of sampling and alphas."""
    return [
        request(
            service.tokenizers,
            text,
            sampling=(GREEDY, SAMPLED, replace(SAMPLED, temperature=0.6, top_p=0.9))[i % 3],
            guidance=Guidance((1.0, 0.0, 0.5, 1.0)[i % 4], warmup_tokens=(0, 0, 0, 5)[i % 4]),
            seed=i,
        )
        for i, text in enumerate(chat_prompts(count))
    ]


async def decode_all(coordinator: Coordinator, requests: Sequence[Generate]) -> list[Answer]:
    """Decode requests concurrently."""
    return await asyncio.gather(*(decode(coordinator, one) for one in requests))


def tokens(answers: Sequence[Answer]) -> list[list[int]]:
    """Tokens of each answer, all of which must have ended without an error."""
    for answer in answers:
        assert isinstance(answer.end, Finished)
        assert answer.end.reason in ("stop", "length"), answer.end
    return [answer.tokens for answer in answers]


def finished(answer: Answer) -> Finished:
    """The Finished event of an answer."""
    end: Any = answer.end
    assert isinstance(end, Finished), end
    return end


_tokens_alone: dict[tuple[str, str], list[int]] = {}  # by configuration and request


async def alone(service: LocalService, requests: list[Generate]) -> list[list[int]]:
    """The tokens of each request while no other session runs; decoded once per process."""
    found = []
    for one in requests:
        key = (repr(service.config), repr(one))
        if key not in _tokens_alone:
            (_tokens_alone[key],) = tokens([await decode(service.coordinators[0], one)])
        found.append(_tokens_alone[key])
    return found
