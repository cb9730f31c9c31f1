"""Serves the playground to a browser: applications on loopback, a scripted service, and the parts of the page."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from actors.api.generation import Delta, Event, Generate, Role
from actors.config import ServiceConfig
from actors.replica.engine_thread import Engine
from router.api import create_app
from router.playground import playground
from tests.support.local_backend import LocalBackend
from tests.support.local_service import LocalService, local_service

AppFactory = Callable[[], AbstractAsyncContextManager[Any]]  # of an ASGI application, in the loop that serves it


@contextmanager
def serving(create: AppFactory) -> Iterator[str]:
    """Serves an application on loopback, in a thread with its own event loop; yields its base URL."""
    listening = socket.create_server(("127.0.0.1", 0))
    up = threading.Event()
    servers: list[uvicorn.Server] = []

    async def serve() -> None:
        async with create() as app:
            server = uvicorn.Server(
                uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
            )
            servers.append(server)
            task = asyncio.create_task(server.serve([listening]))
            while not (server.started or task.done()):  # noqa: ASYNC110 - uvicorn has no event for it
                await asyncio.sleep(0.01)
            up.set()
            await task

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="served")
    thread.start()
    try:
        assert up.wait(30), "the application did not start"
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        for server in servers:
            server.should_exit = True
        thread.join(30)
        listening.close()


class HoldingBackend(LocalBackend):
    """The real trio; while `holding`, answers stop after their first tokens until their clients disconnect."""

    def __init__(self, service: LocalService) -> None:
        super().__init__(service)
        self.service = service
        self.holding = False
        self.left = threading.Semaphore(0)  # released by every held answer whose client disconnects

    async def generate(self, request: Generate) -> AsyncIterator[Event]:
        """See router.backend.Backend.generate."""
        async with aclosing(cast("AsyncGenerator[Event]", super().generate(request))) as events:
            async for event in events:
                yield event
                if self.holding and isinstance(event, Delta) and event.tokens:
                    try:
                        await asyncio.Event().wait()
                    finally:
                        self.left.release()


def trio(config: ServiceConfig, engines: Mapping[Role, Engine], made: list[HoldingBackend]) -> AppFactory:
    """The whole service in this process over HTTP; appends its backend to `made`."""

    @asynccontextmanager
    async def create() -> AsyncIterator[FastAPI]:
        async with local_service(config, engines) as service:
            made.append(HoldingBackend(service))
            yield create_app(config, service.tokenizers, made[-1])

    return create


def candidates(*pairs: tuple[str, float]) -> list[dict[str, Any]]:
    """Candidates of a model, likeliest first."""
    return [{"id": sum(text.encode()), "text": text, "probability": share} for text, share in pairs]


def explained(text: str, **more: Any) -> dict[str, Any]:
    """An explained token that guidance did not change, with every field; `more` overrides."""
    token = {"id": sum(text.encode()), "text": text, "alpha": 1.0, "changed": False, "drafted": False}
    alone = candidates((text, 0.9), (" other", 0.1))
    moved = {"shift": math.log(0.97 / 0.9), "probability": 0.97}
    return token | moved | {"target": alone, "guider": alone, "guided": candidates((text, 0.97))} | more


Chunk = tuple[dict[str, str], Sequence[dict[str, Any]]]  # a delta and the tokens explained with it


VERA = explained(
    " Vera",
    changed=True,
    drafted=True,
    shift=math.log(0.8 / 0.2),
    probability=0.8,
    target=candidates((" Nora", 0.4), (" Vera", 0.2)),
    guider=candidates((" Vera", 0.93), (" Nora", 0.0001)),
    guided=candidates((" Vera", 0.8), (" Nora", 0.1)),
)
FORCED = explained("</think>", shift=None, probability=None, target=[], guider=[], guided=[])
SCRIPT: list[Chunk] = [
    ({"reasoning": "It is"}, [explained("It"), explained(" is")]),
    ({"reasoning": " Vera"}, [VERA]),
    ({}, [FORCED]),
    ({"content": "So: Vera."}, [explained("So", shift=-0.5), explained(":"), explained(" Vera"), explained(".")]),
    ({}, [explained("", id=2)]),
]


class ScriptedService:
    """A service that sends every mode the same scripted answer.

    key: what it asks for, if anything. busy: answers 429. endless: repeats its last chunk until the client leaves.
    """

    def __init__(self, config: ServiceConfig, script: Sequence[Chunk]) -> None:
        self.config, self.script = config, script
        self.key = ""
        self.busy = self.endless = False
        self.requests: list[dict[str, Any]] = []
        self.left = threading.Semaphore(0)  # released by every client that disconnects

    @asynccontextmanager
    async def create(self) -> AsyncIterator[FastAPI]:
        """The application."""
        app = FastAPI()
        app.include_router(playground(self.config))
        app.add_api_route("/v1/models", self._models, methods=["GET"])
        app.add_api_route("/v1/chat/completions", self._chat, methods=["POST"], response_model=None)
        yield app

    def _refusal(self, request: Request) -> Response | None:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "no such key"}}, 401)
        return None

    async def _models(self, request: Request) -> Response:
        cards = [{"id": name, "max_model_len": 4_096} for name in self.config.served_names]
        return self._refusal(request) or JSONResponse({"data": cards})

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        if self.busy:
            return JSONResponse({"error": {"message": "too many wait"}}, 429, headers={"Retry-After": "7"})
        return self._refusal(request) or StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[str]:
        try:
            yield ": still here\n\n"
            for delta, tokens in self.script:
                yield self._event(delta, tokens)
            while self.endless:
                await asyncio.sleep(0.01)
                yield self._event(*self.script[-1])
            yield self._event({}, [], "stop")
            speculation = {"drafted_tokens": 8, "accepted_tokens": 6, "acceptance": 0.75}
            count = sum(len(tokens) for _, tokens in self.script)
            usage = {"completion_tokens": count, "guidance": {"changed_tokens": 1}, "speculation": speculation}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"
        finally:
            self.left.release()

    def _event(self, delta: dict[str, str], tokens: Sequence[dict[str, Any]], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "guidance": {"tokens": tokens}}
        return f"data: {json.dumps({'choices': [choice]})}\n\n"


def states(page: Any, *wanted: str) -> None:
    """Wait until the three answers are in these states."""
    from playwright.sync_api import expect

    expect(page.locator(".state")).to_have_text([*wanted] * (3 // len(wanted)), timeout=15_000)


def part(page: Any, mode: str, name: str) -> Any:
    """A part of one mode's answer."""
    return page.locator(f"[data-kind={mode}] {name}")
