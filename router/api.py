"""The HTTP side: the OpenAI API over the guided model and over each of its roles alone."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.config import ServiceConfig
from actors.requests import Delta, Finished, Role
from actors.tokenizer import RoleTokenizer
from router import openapi
from router.backend import ApiError, Backend, BadRequest, DeadlinePassed, TooLarge
from router.chat import Tokenizers
from router.context import longest
from router.convert import Plan, client_of, plan_chat, plan_completion, served_as
from router.responses import Answer, ChatShape, CompletionShape, Json, Shape, plain_usage
from router.schema import ChatRequest, CompletionRequest, StreamOptions, parse
from router.streams import ClientGone, Generations, joined, while_connected
from router.texts import detokenized, tokenized

log = logging.getLogger(__name__)

KEEP_ALIVE = b": keep-alive\n\n"  # a comment, which readers of server-sent events pass over

R = TypeVar("R", ChatRequest, CompletionRequest)
Planner = Callable[[R, ServiceConfig, dict[Role, RoleTokenizer], str], Plan]


def create_app(service: ServiceConfig, tokenizers: dict[Role, RoleTokenizer], backend: Backend) -> FastAPI:
    """The application: `tokenizers` of all three roles, `backend` decodes."""
    endpoints = Endpoints(service, tokenizers, backend)
    app = FastAPI(title=service.name, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/health", endpoints.health, methods=["GET"], **openapi.HEALTH)
    app.add_api_route("/ready", endpoints.ready, methods=["GET"], **openapi.READY)
    app.add_api_route("/version", endpoints.version, methods=["GET"], **openapi.VERSIONS)
    app.add_api_route("/v1/models", endpoints.models, methods=["GET"], **openapi.MODELS)
    app.add_api_route("/v1/models/{name:path}", endpoints.model, methods=["GET"], **openapi.MODEL)
    app.add_api_route("/v1/chat/completions", endpoints.chat, methods=["POST"], **openapi.CHAT)
    app.add_api_route("/v1/completions", endpoints.completions, methods=["POST"], **openapi.COMPLETIONS)
    app.add_api_route("/tokenize", endpoints.tokenize, methods=["POST"], **openapi.TOKENIZE)
    app.add_api_route("/detokenize", endpoints.detokenize, methods=["POST"], **openapi.DETOKENIZE)
    app.add_api_route("/openapi.json", endpoints.openapi, methods=["GET"], include_in_schema=False)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(ClientGone, _gone)
    app.add_exception_handler(HTTPException, _refused_by_routing)
    app.add_middleware(RequestId)
    return app


@dataclass(frozen=True)
class Endpoints:
    """One method per address."""

    service: ServiceConfig
    tokenizers: dict[Role, RoleTokenizer]
    backend: Backend
    started: int = field(default_factory=lambda: int(time.time()))

    async def health(self) -> Response:
        """Whether this process answers at all."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """Whether every role is there; 503 names those that are not."""
        try:
            async with asyncio.timeout(self.service.deadlines.connect_s):
                status = await self.backend.status()
        except TimeoutError:
            return JSONResponse({"status": "waiting", "missing": [], "awaited": ["an answer of the directory"]}, 503)
        if status.missing:
            content = {"status": "waiting", "missing": list(status.missing), "awaited": list(status.awaited)}
            return JSONResponse(content, 503)
        return JSONResponse({"status": "ready"})

    async def version(self) -> Response:
        """The version of this service."""
        return JSONResponse({"version": openapi.VERSION})

    async def openapi(self, request: Request) -> Response:
        """What all addresses take and answer."""
        return JSONResponse(openapi.document(request.app, self.service.served_names))

    async def models(self) -> Response:
        """All served names."""
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self.service.served_names]})

    async def model(self, name: str) -> Response:
        """One served name."""
        served_as(self.service, name)
        return JSONResponse(self._card(name))

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._answer(request, ChatRequest, plan_chat, ChatShape)

    async def completions(self, request: Request) -> Response:
        """Continue raw text or tokens."""
        return await self._answer(request, CompletionRequest, plan_completion, CompletionShape)

    async def tokenize(self, request: Request) -> Response:
        """The tokens of a text or of a conversation's prompt."""
        return await self._told(request, tokenized)

    async def detokenize(self, request: Request) -> Response:
        """The text of tokens."""
        return await self._told(request, detokenized)

    async def _told(self, request: Request, tell: Callable[[Any, ServiceConfig, Tokenizers], Json]) -> Response:
        with _explained(request.scope["request_id"]):
            body = await _json_body(request, self.service.router.max_request_bytes)
            return JSONResponse(await asyncio.to_thread(tell, body, self.service, self.tokenizers))

    async def _answer(self, request: Request, kind: type[R], planner: Planner[R], shape: type[Shape]) -> Response:
        request_id: str = request.scope["request_id"]
        with _explained(request_id):
            async with asyncio.timeout(self.service.deadlines.request_s) as deadline:
                body = parse(kind, await _json_body(request, self.service.router.max_request_bytes))
                # A long prompt takes long to tokenise, and other streams must not wait for it.
                plan = await asyncio.to_thread(planner, body, self.service, self.tokenizers, request_id)
                plan = plan.asked_by(client_of(request.headers.get("authorization"), body.user))
                prompts = plan.prompts if body.return_token_ids else None
                bodies = shape(request_id, body.model, plan.seed, body.explain, prompts)
                if body.stream:
                    options = body.stream_options or StreamOptions()
                    idle_s = self.service.router.keep_alive_s
                    return EventStream(self.backend, plan, bodies, options, deadline.when(), idle_s)
                answers = await while_connected(request.receive, _collected(self.backend, plan))
                return JSONResponse(bodies.body(answers, plan.prompt_tokens))

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": self.service.name,
            "max_model_len": longest(self.service, self.tokenizers, name),
        }


class EventStream(Response):
    """An answer as server-sent events. The status waits for the first event, so that an early refusal keeps its own."""

    media_type = "text/event-stream"

    def __init__(
        self,
        backend: Backend,
        plan: Plan,
        shape: Shape,
        options: StreamOptions,
        deadline: float | None,
        idle_s: float,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._backend, self._plan, self._shape = backend, plan, shape
        self._options, self._deadline, self._idle_s = options, deadline, idle_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the end, an error or the client's leaving."""
        request_id: str = scope["request_id"]
        try:
            await while_connected(receive, self._send_all(request_id, _noticing_departure(send)))
        except ClientGone:
            log.info("%s: the client left; its generations are cancelled", request_id)

    async def _send_all(self, request_id: str, send: Send) -> None:
        started = False
        try:
            with _explained(request_id):
                async with asyncio.timeout_at(self._deadline), aclosing(self._events()) as events:
                    async for event in events:
                        if not started:
                            started = True
                            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                        await send({"type": "http.response.body", "body": event, "more_body": True})
        except ApiError as error:
            if not started:
                raise
            await send({"type": "http.response.body", "body": _event(error.body(request_id)), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncGenerator[bytes, None]:
        seen: set[int] = set()
        ends: dict[int, Finished] = {}
        counts = [0] * len(self._plan.sequences)  # tokens by choice
        async with Generations(self._backend, self._plan.sequences, idle_s=self._idle_s) as generations:
            async for batch in generations.batches():
                ends |= batch.finished
                chunks = []
                for choice in sorted(batch.deltas.keys() | batch.finished.keys()):
                    delta, end = batch.deltas.get(choice), batch.finished.get(choice)
                    chunks.append(self._shape.chunk(choice, delta, end, first=choice not in seen))
                    seen.add(choice)
                    counts[choice] += len(delta.tokens) if delta else 0
                    if self._options.include_usage and self._options.continuous_usage_stats:
                        chunks[-1] |= {"usage": plain_usage(len(self._plan.prompts[choice]), counts[choice])}
                yield b"".join(map(_event, chunks)) or KEEP_ALIVE
        if self._options.include_usage:
            usages = [ends[choice].usage for choice in sorted(ends)]
            yield _event(self._shape.usage_chunk(usages, self._plan.prompt_tokens))
        yield b"data: [DONE]\n\n"


class RequestId:
    """Takes over the client's X-Request-Id, or makes one, and returns it with every response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its id in the scope."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if re.fullmatch(r"[A-Za-z0-9._-]{1,128}", given) else uuid.uuid4().hex
        scope["request_id"] = request_id

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self.app(scope, receive, named)


def _noticing_departure(send: Send) -> Send:
    async def noticing(message: Message) -> None:
        try:
            await send(message)
        except OSError:  # what servers raise for a closed connection
            raise ClientGone from None

    return noticing


async def _json_body(request: Request, most: int) -> Any:
    refusal = TooLarge(f"the body is larger than the {most} bytes that this service reads", code="request_too_large")
    stated = request.headers.get("content-length", "")
    if stated.isdigit() and int(stated) > most:
        raise refusal
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise refusal
    try:
        value = json.loads(body)
        if b"\\ud" in body.lower():  # half of a surrogate pair is a JSON string, but no text
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    return value


async def _collected(backend: Backend, plan: Plan) -> list[Answer]:
    deltas: dict[int, Delta] = {}
    ends: dict[int, Finished] = {}
    async with Generations(backend, plan.sequences) as generations:
        async for batch in generations.batches():
            ends |= batch.finished
            for choice, delta in batch.deltas.items():
                deltas[choice] = joined(deltas.get(choice), delta)
    return [Answer(deltas.get(choice, Delta()), ends[choice]) for choice in range(len(plan.sequences))]


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


@contextmanager
def _explained(request_id: str) -> Iterator[None]:
    """Turn what goes wrong into an error for the client; what nobody foresaw goes to the log, not to the client."""
    try:
        yield
    except (ApiError, ClientGone):
        raise
    except TimeoutError as error:
        raise DeadlinePassed("the service's deadline for one request has passed: ask for fewer tokens") from error
    except ClientDisconnect:
        raise ClientGone from None
    except Exception as error:
        log.exception("%s failed", request_id)
        raise ApiError(f"something went wrong inside; the log has it under the request id {request_id}") from error


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(request.scope["request_id"]), error.status, headers=error.headers)


async def _gone(request: Request, error: Exception) -> Response:
    log.info("%s: the client left; its generations are cancelled", request.scope["request_id"])
    return Response(status_code=499)  # nobody reads it


async def _refused_by_routing(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refusal = BadRequest(f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(refusal.body(request.scope["request_id"]), error.status_code, headers=error.headers)
