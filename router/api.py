"""The HTTP application: OpenAI's API for the guided model and for each of its roles alone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from actors.api.generation import Delta, Role
from actors.config import ServiceConfig
from actors.metrics import Recorder
from actors.text.tokenizer import RoleTokenizer
from router import openapi
from router.addresses import advice
from router.auth import add_access_checks, error_response
from router.backend import ApiError, Backend, BadRequest, NotFound, TooLarge
from router.body import read_json
from router.chat import Tokenizers
from router.context import max_model_len
from router.grammars import GrammarChecks, grammar_text
from router.logprobs import TokenFormatter
from router.metrics_endpoint import Exposition
from router.playground import playground
from router.request_id import ClientId, RequestId
from router.request_log import CLIENT_CLOSED, RequestRecord, request_path
from router.request_planning import Plan, client_id, plan_chat, plan_completion, require_model
from router.responses import BodyFormat, ChatFormat, CompletedChoice, CompletionFormat, Json
from router.schema import ChatRequest, CompletionRequest, StreamOptions, parse
from router.sse import EventStream, api_errors
from router.streams import Batch, ClientGone, Generations, while_connected
from router.tokenize_api import detokenize, tokenize
from router.tool_calls import ToolCallFormat
from router.tool_grammar import answer_grammar

log = logging.getLogger(__name__)


R = TypeVar("R", ChatRequest, CompletionRequest)
Convert = Callable[[Any, ServiceConfig, Tokenizers], Json]
Planner = Callable[[R, ServiceConfig, dict[Role, RoleTokenizer], str], Plan]


def create_app(
    service: ServiceConfig,
    tokenizers: dict[Role, RoleTokenizer],
    backend: Backend,
    recorder: Recorder | None = None,
    grammars: GrammarChecks | None = None,
) -> FastAPI:
    """The HTTP application of a service.

    tokenizers: of all three roles. backend: decodes. recorder: collects the metrics. grammars: checks grammars; the
    application stops it when it is shut down.
    Raises ConfigError if API keys are configured and cannot be read, or if the sampling of the target's checkpoint is
    configured and is wrong.
    """
    service = service.with_recommended_sampling(tokenizers["target"].recommended)
    recorder = Recorder() if recorder is None else recorder
    grammars = GrammarChecks(tokenizers) if grammars is None else grammars
    endpoints = Endpoints(service, tokenizers, backend, grammars)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await grammars.stop()

    app = FastAPI(
        title=service.name, responses=openapi.ERRORS, openapi_url=None, redirect_slashes=False, lifespan=lifespan
    )
    get, post = app.get, app.post  # response models only describe: handlers return ready responses
    get("/health", response_model=openapi.StatusBody)(endpoints.health)
    get("/ready", response_model=openapi.StatusBody, responses={503: {"model": openapi.StatusBody}})(endpoints.ready)
    get("/metrics", include_in_schema=False)(Exposition(recorder).respond)
    get("/version", response_model=openapi.VersionBody)(endpoints.version)
    get("/v1/models", response_model=openapi.ModelList)(endpoints.models)
    get("/v1/models/{name:path}", response_model=openapi.ModelCard)(endpoints.model)
    post("/v1/chat/completions", response_model=openapi.ChatAnswer, **openapi.CHAT)(endpoints.chat)
    post("/v1/completions", response_model=openapi.TextAnswer, **openapi.COMPLETIONS)(endpoints.completions)
    post("/tokenize", response_model=openapi.TokenizedBody, **openapi.TOKENIZE)(endpoints.tokenize)
    post("/detokenize", response_model=openapi.DetokenizedBody, **openapi.DETOKENIZE)(endpoints.detokenize)
    get("/openapi.json", include_in_schema=False)(endpoints.openapi)
    app.include_router(playground(service))
    app.add_exception_handler(ApiError, _handle_api_error)
    app.add_exception_handler(ClientGone, _client_closed)
    app.add_exception_handler(HTTPException, _handle_routing_error)
    app.add_middleware(TrailingSlash)  # innermost: open addresses are compared as they are written
    add_access_checks(app, service.router, recorder)
    app.add_middleware(RequestId)  # added last, so it receives a request first
    return app


@dataclass(frozen=True)
class Endpoints:
    """The request handlers, one method per address."""

    service: ServiceConfig
    tokenizers: dict[Role, RoleTokenizer]
    backend: Backend
    grammars: GrammarChecks
    started: int = field(default_factory=lambda: int(time.time()))

    async def health(self) -> Response:
        """Answer 200 while this process runs."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """Answer 200 if every role is connected; otherwise 503 with the missing roles."""
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
        """Return the version of this service."""
        return JSONResponse({"version": openapi.VERSION})

    async def openapi(self, request: Request) -> Response:
        """Return the OpenAPI document."""
        return JSONResponse(openapi.document(request.app, self.service.served_names))

    async def models(self) -> Response:
        """List the served models."""
        return JSONResponse({"object": "list", "data": [self._model_card(name) for name in self.service.served_names]})

    async def model(self, name: str) -> Response:
        """Describe one served model."""
        require_model(self.service, name)
        return JSONResponse(self._model_card(name))

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._answer(request, ChatRequest, plan_chat, ChatFormat)

    async def completions(self, request: Request) -> Response:
        """Continue raw text or tokens."""
        return await self._answer(request, CompletionRequest, plan_completion, CompletionFormat)

    async def tokenize(self, request: Request) -> Response:
        """Return the tokens of a text or of a conversation's prompt."""
        return await self._run_tokenizer(request, tokenize)

    async def detokenize(self, request: Request) -> Response:
        """Return the text of tokens."""
        return await self._run_tokenizer(request, detokenize)

    async def _run_tokenizer(self, request: Request, convert: Convert) -> Response:
        with api_errors(request.scope["request_id"]):
            body = await read_json(request, self.service.router.max_request_bytes)
            return JSONResponse(await asyncio.to_thread(convert, body, self.service, self.tokenizers))

    async def _answer(self, request: Request, kind: type[R], planner: Planner[R], form: type[BodyFormat]) -> Response:
        request_id: ClientId = request.scope["request_id"]
        record: RequestRecord = request.scope["record"]
        with api_errors(request_id):
            async with asyncio.timeout(self.service.deadlines.request_s) as deadline:
                body = parse(kind, await read_json(request, self.service.router.max_request_bytes))
                if body.request_id is not None:
                    request_id.rename(body.request_id)
                name = body.model or self.service.name
                record.model = name if name in self.service.served_names else None
                # Tokenising a long prompt takes long; in a thread it does not delay other streams.
                plan = await asyncio.to_thread(planner, body, self.service, self.tokenizers, request_id.text)
                grammar, param = self._grammar(body, plan)
                if grammar:
                    await self.grammars.require(grammar, plan.primary, param)
                    plan = plan.with_grammar(grammar)
                client = client_id(record.key, request.headers.get("authorization"), body.user)
                plan = plan.for_client(client, record.trace_id)
                record.prompt_tokens = plan.prompt_tokens
                if self.service.router.log_prompts:
                    record.prompt = body.model_dump(include={"messages", "prompt"}, exclude_unset=True)
                _require_size(plan, self.service.router.max_request_tokens)
                backend = record.watch(self.backend)
                prompts = plan.prompts if body.return_token_ids else None
                tokens = TokenFormatter(self.tokenizers[plan.primary], bool(body.return_tokens_as_token_ids))
                wanted = body.explain, body.candidates, body.prompt_logprobs, plan.echo, prompts
                shown = not isinstance(body, ChatRequest) or body.include_reasoning
                metrics = record.metrics if body.include_metrics else None
                more: dict[str, Any] = {"include_reasoning": shown, "metrics": metrics}
                more["choices_per_prompt"] = plan.choices_per_prompt
                ids = [sequence.request_id for sequence in plan.sequences]
                more["calls"] = ToolCallFormat(plan.tools, ids) if plan.tools else None
                bodies = form(request_id.text, name, plan.seed, tokens, *wanted, **more)
                if body.stream:
                    options = body.stream_options or StreamOptions()
                    idle_s = self.service.router.keep_alive_s
                    return EventStream(backend, plan, bodies, options, deadline.when(), idle_s)
                answers = await while_connected(request.receive, _collect_choices(backend, plan))
                return JSONResponse(bodies.body(answers, plan.prompt_tokens))

    def _grammar(self, body: ChatRequest | CompletionRequest, plan: Plan) -> tuple[str, str]:
        """The grammar of the answers, "" for none, and the field that asks for it."""
        if plan.tools is None or not isinstance(body, ChatRequest):
            return grammar_text(body)
        return answer_grammar(body, plan.tools, self.tokenizers[plan.primary])

    def _model_card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": self.service.name,
            "root": name,
            "parent": None,
            "max_model_len": max_model_len(self.service, self.tokenizers, name),
            "permission": [{"id": f"modelperm-{name}", "created": self.started, **openapi.PERMISSION}],
        }


class TrailingSlash:
    """Middleware that serves an address with a slash at its end like the one without. A redirect would name a host."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on without the slash; "/" itself stays."""
        if scope["type"] == "http" and request_path(scope).strip("/"):
            scope = {**scope, "path": scope["path"].rstrip("/")}
        await self.app(scope, receive, send)


def _require_size(plan: Plan, most: int | None) -> None:
    if most is not None and plan.max_total_tokens > most:
        raise TooLarge(
            f"this request may come to {plan.max_total_tokens} tokens, and the service takes {most}: ask for fewer "
            "max_tokens or choices",
            param="max_tokens",
            code="request_too_large",
        )


async def _collect_choices(backend: Backend, plan: Plan) -> list[CompletedChoice]:
    whole = Batch()
    async with Generations(backend, plan.sequences) as generations:
        async for batch in generations.batches():
            whole.finished |= batch.finished
            for choice, delta in batch.deltas.items():
                whole.add(choice, delta)
    choices = range(len(plan.sequences))
    return [CompletedChoice(whole.deltas.get(choice, Delta()), whole.finished[choice]) for choice in choices]


async def _handle_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(request.scope, error)


async def _client_closed(request: Request, error: Exception) -> Response:
    log.info("%a: the client disconnected; its generations are cancelled", request.scope["request_id"].text)
    return Response(status_code=CLIENT_CLOSED)  # the client does not receive it


async def _handle_routing_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    found = f"{request.method} {request.url.path}: {error.detail}"
    if error.status_code == NotFound.status:
        return error_response(request.scope, NotFound(f"{found}; {advice(request_path(request.scope))}"))
    body = BadRequest(found).body(request.scope["request_id"].text)
    return JSONResponse(body, error.status_code, headers=error.headers)
