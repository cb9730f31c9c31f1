"""A service without models: a configuration, tokenizers whose marks differ by role, and a scripted backend."""

from __future__ import annotations

import asyncio
import json
import math
import socket
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from actors.api.generation import (
    Delta,
    Event,
    Finished,
    FinishReason,
    Generate,
    PromptNote,
    Rejected,
    Role,
    Scores,
    TokenNote,
    Usage,
)
from actors.config import ServiceConfig, load_config
from actors.text.tokenizer import RoleTokenizer
from router.api import create_app
from router.backend import Status
from tests.support.deadlines import HANG_S
from tests.support.tokenizers import MARKS, byte_level, role_tokenizer


def config(**more: Any) -> ServiceConfig:
    """A configuration named "duo" whose model paths are never opened."""
    models = more.pop("models", {})
    roles = {role: {"path": role, **models.get(role, {})} for role in ("target", "guider", "guider_base")}
    return load_config({"version": 1, "name": "duo", "models": roles, **more})


def tokenizers() -> dict[Role, RoleTokenizer]:
    """The guider's marks have other ids than the target's; the guider base has no template and no thinking marks."""
    return {
        "target": role_tokenizer(),
        "guider": role_tokenizer(byte_level(MARKS[::-1]), max_position=400),
        "guider_base": role_tokenizer(byte_level(MARKS[:2]), template=None, max_position=300),
    }


def usage(sequence: Generate, tokens: int, reasoning: int = 0) -> Usage:
    """Counts of a sequence in which guidance changed every second token."""
    prompt = len(sequence.prompts[sequence.primary])
    guided = 0 if sequence.guidance.never_guides() else tokens
    return Usage(prompt, tokens, reasoning, guided, guided // 2, 1, 0.25)


class ScriptedBackend:
    """A backend that answers with one word per token; it records its requests and cancellations.

    proceed: if set, each sequence waits for it after its first word. fail: an exception raised after the first word.
    """

    def __init__(self, thought: str = "", text: str = "It is Eve .") -> None:
        self.thought, self.text = thought, text
        self.requests: list[Generate] = []
        self.cancelled: list[str] = []
        self.proceed: asyncio.Event | None = None
        self.fail: Exception | None = None
        self.error: str | None = None
        self.reason: FinishReason = "stop"
        self.rejected: Rejected | None = None
        self.current_status = Status()
        self.began = asyncio.Semaphore(0)  # released by every sequence that begins

    async def generate(self, request: Generate) -> AsyncIterator[Event]:
        self.requests.append(request)
        self.began.release()
        if self.rejected is not None:
            yield self.rejected
            return
        if request.prompt_logprobs is not None:
            yield Delta(prompt=_prompt_notes(request))
        if request.only_prompt:
            yield Finished("length", usage(request, 0))
            return
        try:
            thoughts, words = self.thought.split(), self.text.split(" ")
            for number, word in enumerate([*thoughts, *words]):
                text = word if number in (0, len(thoughts)) else f" {word}"
                notes = [_note(number, text, request)] if request.top is not None else []
                inside = number < len(thoughts)
                yield Delta(text if inside else "", "" if inside else text, [number], notes)
                if self.proceed is not None:
                    await self.proceed.wait()
                if self.fail is not None:
                    raise self.fail
            counts = usage(request, len(thoughts) + len(words), len(thoughts))
            yield Finished("error" if self.error else self.reason, counts, None, self.error)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.append(request.request_id)
            raise

    async def status(self) -> Status:
        return self.current_status


def _note(number: int, text: str, request: Generate) -> TokenNote:
    """A note in which each candidate is half as likely as the one before; every third token is forced."""
    if number % 3 == 2:
        return TokenNote(number, text, request.guidance.alpha, False)
    likeliest = tuple((number + rank, -math.log(2) * (rank + 1)) for rank in range(request.top or 0))
    scores = Scores(-math.log(2) * (1 + number % 2), 0.0, likeliest)
    return TokenNote(number, text, request.guidance.alpha, number % 2 == 1, False, scores)


def _prompt_notes(request: Generate) -> list[PromptNote]:
    """Notes in which each token but the first ranks second; the likeliest has the next id."""
    first, *others = request.prompts[request.primary]
    return [
        PromptNote(first, None),
        *(PromptNote(token, -2.0, 2, ((token + 1, -1.0), (token, -2.0))) for token in others),
    ]


def client(backend: ScriptedBackend, service: ServiceConfig | None = None) -> httpx.AsyncClient:
    """An HTTP client of an application over `backend`."""
    app = create_app(service or config(), tokenizers(), backend)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service")


async def sent_messages(
    app: FastAPI, path: str, body: dict[str, Any], received: Callable[[bytes], object] = lambda message: None
) -> list[bytes]:
    """The messages in which an application sends the body of its answer, without the empty one at the end.

    received: called with each message; if it returns True, the client disconnects.
    """
    incoming = asyncio.Queue[MutableMapping[str, Any]]()
    incoming.put_nowait({"type": "http.request", "body": json.dumps(body).encode()})
    sent: list[bytes] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        if message.get("body"):
            sent.append(message["body"])
            if received(message["body"]) is True:
                incoming.put_nowait({"type": "http.disconnect"})

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
    await app(scope, incoming.get, send)
    return sent


@asynccontextmanager
async def serving(app: ASGIApp) -> AsyncIterator[str]:
    """Serves an application with uvicorn on loopback, in this process; yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        running = asyncio.create_task(server.serve([listening]))
        try:
            async with asyncio.timeout(HANG_S):
                while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
                    await asyncio.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            await running
