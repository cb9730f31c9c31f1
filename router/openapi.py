"""The service's OpenAPI document: what the addresses take and answer, for readers, generators and checkers.

The models here only describe: bodies are read by `router.schema.parse` and written by `router.responses`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from router.schema import (
    IGNORED,
    NOT_SERVED,
    NULL_IS_DEFAULT,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChat,
    TokenizeText,
)

VERSION = "0.1.0"  # of pyproject.toml, which does not travel with an installed service

_OPENAPI = "3.2.0"  # the first one that says what the events of a stream are

Json = dict[str, Any]
FinishReason = Literal["stop", "length", "abort"]
_REQUESTS = (ChatRequest, CompletionRequest, TokenizeText, TokenizeChat, DetokenizeRequest)
_SAMPLED = (ChatRequest, CompletionRequest)


class Error(BaseModel):
    """What went wrong; param: the field of the request. choices: the tokens so far, where generating had begun."""

    message: str
    type: str
    param: str | None
    code: str | None
    request_id: str
    choices: list[Json] | None = None


class ErrorBody(BaseModel):
    """The body of every refusal, and the event that ends a stream which fails."""

    error: Error


class TokenDetails(BaseModel):
    """Kinds of an answer's tokens."""

    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class UsageBody(BaseModel):
    """Counts; a prompt counts once, however many choices it has. The plain three alone in chunks before the last."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: TokenDetails | None = None
    guidance: dict[str, float] | None = None
    speculation: dict[str, float] | None = None


class Candidate(BaseModel):
    """A token that a model would have said."""

    id: int
    text: str
    probability: float


class ExplainedToken(BaseModel):
    """What guidance did to one token; of a forced one, which nobody chose, nothing but that it was said.

    shift: log p(guided) - log p(target), nats. probability: in the combined distribution.
    """

    id: int
    text: str
    alpha: float
    changed: bool
    drafted: bool
    shift: float | None
    probability: float | None
    target: list[Candidate]
    guider: list[Candidate]
    guided: list[Candidate]


class Explanation(BaseModel):
    """In a choice where `guidance.explain` was asked for."""

    tokens: list[ExplainedToken]


class Choice(BaseModel):
    """What choices have in common. token_ids: where `return_token_ids` was asked for."""

    index: int
    logprobs: Json | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    guidance: Explanation | None = None


class Message(BaseModel):
    """An answer; reasoning: its thinking, under both of its usual names."""

    role: Literal["assistant"]
    content: str
    reasoning: str | None
    reasoning_content: str | None


class MessagePart(BaseModel):
    """More of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class ChatChoice(Choice):
    """One answer."""

    message: Message


class ChatChunkChoice(Choice):
    """More of one answer."""

    delta: MessagePart


class TextChoice(Choice):
    """One continuation, or more of one in a chunk."""

    text: str
    reasoning: str | None = None
    prompt_token_ids: list[int] | None = None


class Answer(BaseModel):
    """What answers have in common."""

    id: str
    created: int
    model: str
    seed: int


class ChatAnswer(Answer):
    """The answer of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: UsageBody
    prompt_token_ids: list[int] | None = None


class ChatChunk(Answer):
    """An event of a streamed chat."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: UsageBody | None = None
    prompt_token_ids: list[int] | None = None


class TextAnswer(Answer):
    """The answer of /v1/completions."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: UsageBody


class TextChunk(Answer):
    """An event of a streamed completion."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: UsageBody | None = None


class TokenizedBody(BaseModel):
    """The answer of /tokenize. max_model_len: tokens that the model takes, prompt and answer together."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizedBody(BaseModel):
    """The answer of /detokenize."""

    prompt: str


class ModelCard(BaseModel):
    """One served name."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    """All served names."""

    object: Literal["list"]
    data: list[ModelCard]


class StatusBody(BaseModel):
    """How the service is; missing: roles that are not there, awaited: what they wait for."""

    status: Literal["ok", "ready", "waiting"]
    missing: list[str] | None = None
    awaited: list[str] | None = None


class VersionBody(BaseModel):
    """The version of this service."""

    version: str


ERRORS: dict[int | str, Json] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}  # `responses` of every route


def _reference(model: str) -> Json:
    return {"$ref": f"#/components/schemas/{model}"}


def _reads(*bodies: type[BaseModel]) -> Json:
    """Of a route whose handler parses the request's body itself, as one of these models."""
    schemas = [_reference(body.__name__) for body in bodies]
    content = {"application/json": {"schema": schemas[0] if len(schemas) == 1 else {"oneOf": schemas}}}
    return {"openapi_extra": {"requestBody": {"required": True, "content": content}}}


def _streams(chunk: type[BaseModel]) -> Json:
    """Of a route that also answers as a stream of events: chunks or an error, then [DONE]."""
    body = {"anyOf": [_reference(chunk.__name__), _reference(ErrorBody.__name__)]}
    event = {"contentMediaType": "application/json", "contentSchema": body}
    data = {"type": "string", "anyOf": [{"const": "[DONE]"}, event]}
    item = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {"responses": {200: {"content": {"text/event-stream": {"itemSchema": item}}}}}


# What FastAPI's `response_model` does not say of the four routes that read a body: arguments of `app.post`.
CHAT = _reads(ChatRequest) | _streams(ChatChunk)
COMPLETIONS = _reads(CompletionRequest) | _streams(TextChunk)
TOKENIZE = _reads(TokenizeText, TokenizeChat)
DETOKENIZE = _reads(DetokenizeRequest)


def document(app: FastAPI, names: Iterable[str]) -> Json:
    """The OpenAPI document of an application's routes. names: the served models."""
    spec = get_openapi(title=app.title, version=VERSION, openapi_version=_OPENAPI, routes=app.routes)
    # FastAPI does not see the bodies that handlers parse, nor the chunks of a stream.
    models = [(body, "validation") for body in _REQUESTS] + [(ChatChunk, "serialization"), (TextChunk, "serialization")]
    _, shared = models_json_schema(models, ref_template=_reference("{model}")["$ref"])  # type: ignore[arg-type]
    schemas: Json = spec["components"]["schemas"]
    schemas |= shared["$defs"]
    for body in _REQUESTS:
        fields, sampled = schemas[body.__name__]["properties"], body in _SAMPLED
        fields["model"] = {"enum": list(names)}
        for name in fields.keys() & (NULL_IS_DEFAULT if sampled else NULL_IS_DEFAULT | {"model"}):
            fields[name] = {"anyOf": [fields[name], {"type": "null"}]}
        for name in IGNORED if sampled else ():
            fields.setdefault(name, {"description": "Read, and changes nothing."})
        for name, neutral in NOT_SERVED.items() if sampled else ():
            told = "Not served: taken where it asks for nothing."
            fields.setdefault(name, {"enum": list(neutral), "description": told})
    return spec
