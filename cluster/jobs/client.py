"""The client of a job: sends the requests of an evaluation to a service, and repeats each until it is answered.

It talks to a `Backend`: the coordinators behind Serve's handles, or one coordinator in this process.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, cast

from actors.api.generation import Delta, Event, Finished, Generate, Rejected, Role, Usage
from actors.config import ConfigError, ServiceConfig
from actors.decoding.hashing import derive_seed, extend_hashes
from actors.text.tokenizer import RoleTokenizer
from cluster.jobs.config import Arm
from cluster.jobs.sample import Key
from cluster.jobs.task_loading import Problem, Task
from router.backend import ApiError, Backend, BadRequest, Overloaded, Unavailable, rejection
from router.request_planning import plan_chat, plan_completion
from router.schema import ChatMessage, ChatRequest, CompletionRequest, GuidanceFields

PATIENCE_S = 900.0  # a service that accepts no request for this long is lost; loading a model takes minutes
LOSSES = 5  # attempts at one sample that may fail after their first token
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0


class Unanswered(RuntimeError):
    """The service did not answer. Finished samples are stored, and the same command resumes."""


@dataclass(frozen=True, slots=True)
class Item:
    """One sample to generate. seed: of the run. number: of the sample among those of its problem."""

    task: Task
    problem: Problem
    arm: Arm
    seed: int
    number: int

    @property
    def key(self) -> Key:
        """The key of the sample in the results."""
        return Key(self.task.name, self.problem.id, self.arm.mode, self.arm.setting, self.seed, self.number)

    @property
    def choice_seed(self) -> int:
        """H(run seed, task, problem, number). Modes and settings share it: common random numbers pair their samples."""
        return derive_seed(self.seed, _hash(self.task.name), _hash(self.problem.id), self.number)


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer. tokens: ids of the mode's primary role. seconds: of the successful attempt."""

    text: str
    tokens: tuple[int, ...]
    end: Finished
    seconds: float

    @property
    def usage(self) -> Usage:
        """The token counts of the answer."""
        return self.end.usage


class Client:
    """Sends requests to a backend whose configuration is `service`.

    tokenizers: of all three roles. on_tokens: called with the number of tokens of each received message.
    """

    def __init__(
        self,
        backend: Backend,
        service: ServiceConfig,
        tokenizers: Mapping[Role, RoleTokenizer],
        *,
        drafts: int | None = None,
        patience_s: float = PATIENCE_S,
        on_tokens: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        self._backend, self._service, self._tokenizers = backend, service, dict(tokenizers)
        self._drafts, self._patience_s, self._on_tokens = drafts, patience_s, on_tokens

    def request(self, item: Item) -> Generate:
        """The request that the router would make for this sample. Raises ConfigError if it does not fit the models."""
        try:
            made = plan_item(item, self._service, self._tokenizers)
        except ApiError as error:
            raise ConfigError(f"{item.task.name}, problem {item.problem.id}, {item.arm}: {error.message}") from None
        unique = "-".join(map(str, item.key))
        return replace(made, request_id=unique, seed=item.choice_seed, drafts=self._drafts)

    async def answer_item(self, item: Item) -> Answer:
        """The answer to one sample. See `answer`."""
        return await self.answer(self.request(item))

    async def answer(self, request: Generate) -> Answer:
        """The answer to one request. Repeats the request if the service is full or unavailable, or loses the answer.

        Raises Unanswered after `patience_s` seconds without acceptance or after LOSSES lost answers, ConfigError if
        the service refuses the request itself.
        """
        refused_since, refusals, losses = time.monotonic(), 0, 0
        while True:
            attempt = _Attempt(request, self._on_tokens)
            try:
                return await attempt.run(self._backend)
            except BadRequest as error:
                raise ConfigError(f"{request.request_id}: the service refuses the request: {error.message}") from None
            except (Overloaded, Unavailable, _Lost) as error:
                if attempt.begun:
                    refused_since, refusals, losses = time.monotonic(), 0, losses + 1
                refusals += 1
                if losses >= LOSSES or time.monotonic() - refused_since > self._patience_s:
                    raise Unanswered(f"{request.request_id}: {error}") from error
                await asyncio.sleep(_pause(refusals))


class _Lost(RuntimeError):
    """An answer ended with an error, or without a last message."""


class _Attempt:
    """One attempt at a request. begun: True once tokens have arrived."""

    def __init__(self, request: Generate, on_tokens: Callable[[int], None]) -> None:
        self._request, self._on_tokens = request, on_tokens
        self.begun = False

    async def run(self, backend: Backend) -> Answer:
        """The answer. Raises the errors of `Backend.generate`, the error of a rejection, or _Lost."""
        began, deltas = time.perf_counter(), []
        # Closing the stream cancels the generation, so that an interrupted run leaves no work to the service.
        async with aclosing(cast("AsyncGenerator[Event, None]", backend.generate(self._request))) as events:
            async for event in events:
                if isinstance(event, Rejected):
                    raise rejection(event)
                if isinstance(event, Delta):
                    self.begun = True
                    self._on_tokens(len(event.tokens))
                    deltas.append(event)
                    continue
                if event.reason not in ("stop", "length"):
                    raise _Lost(event.error or f"it ended with {event.reason}")
                seconds = time.perf_counter() - began
                tokens = tuple(token for delta in deltas for token in delta.tokens)
                return Answer(self._text(deltas), tokens, event, seconds)
        raise _Lost("the stream ended before the answer did")

    def _text(self, deltas: list[Delta]) -> str:
        """The generated text, with the mark between thinking and answer that the API drops."""
        reasoning, content = ("".join(getattr(delta, part) for delta in deltas) for part in ("reasoning", "content"))
        return reasoning + (self._request.thinking.end if reasoning and content else "") + content


def plan_item(item: Item, service: ServiceConfig, tokenizers: dict[Role, RoleTokenizer]) -> Generate:
    """The router's request for a sample: a chat with one user message, or a completion of one text by all roles."""
    task = item.task
    fields: dict[str, Any] = {
        "model": next(name for name, served in service.served_names.items() if served == item.arm.mode),
        "temperature": task.temperature,
        "top_p": task.top_p,
        "max_tokens": task.max_tokens,
        "stop": list(task.stop),
        "stop_on_repeat": task.stop_on_repeat,
        "guidance": _guidance(item.arm),
    }
    if task.style == "raw":
        body = CompletionRequest(prompt=item.problem.prompt, **fields)
        return plan_completion(body, service, tokenizers, "job").sequences[0]
    message = ChatMessage(role="user", content=item.problem.prompt)
    return plan_chat(ChatRequest(messages=[message], **fields), service, tokenizers, "job").sequences[0]


def _guidance(arm: Arm) -> GuidanceFields | None:
    """The arm's guidance with every field set, so that no default of the service applies."""
    if arm.mode != "guided":
        return None
    own = arm.guidance
    return GuidanceFields(
        alpha=own.alpha, warmup_tokens=own.warmup_tokens, schedule=list(own.schedule), guide=own.guide
    )


def _hash(text: str) -> int:
    return extend_hashes(0, text.encode())[-1]


def _pause(refusals: int) -> float:
    """Seconds before the next attempt, with jitter, so that requests refused together do not return together."""
    return random.uniform(0.5, 1.0) * min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(refusals, 16))
