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


_REFUSED: Json = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}


def _reference(name: str) -> str:
    return f"#/components/schemas/{name}"


def _asked(kinds: tuple[type[BaseModel], ...], answer: type[BaseModel], chunk: type[BaseModel] | None = None) -> Json:
    """A route that reads one of `kinds` and answers; chunk: what the events of a stream hold."""
    schemas = [{"$ref": _reference(kind.__name__)} for kind in kinds]
    body = {"schema": schemas[0] if len(schemas) == 1 else {"oneOf": schemas}}
    answered: Json = {"model": answer, "description": "The answer."}
    if chunk is not None:
        events = [{"$ref": _reference(kind.__name__)} for kind in (chunk, ErrorBody)]
        told = {"contentMediaType": "application/json", "contentSchema": {"anyOf": events}}
        data = {"type": "string", "anyOf": [{"const": "[DONE]"}, told]}
        item = {"type": "object", "properties": {"data": data}, "required": ["data"]}
        answered["content"] = {"text/event-stream": {"itemSchema": item}}
    extra = {"requestBody": {"required": True, "content": {"application/json": body}}}
    return {"responses": {200: answered, **_REFUSED}, "openapi_extra": extra}


def _told(answer: type[BaseModel], *more: int) -> Json:
    """A route that takes no body; more: further statuses with such an answer."""
    return {"responses": {status: {"model": answer} for status in (200, *more)} | _REFUSED}


CHAT = _asked((ChatRequest,), ChatAnswer, ChatChunk)
COMPLETIONS = _asked((CompletionRequest,), TextAnswer, TextChunk)
TOKENIZE = _asked((TokenizeText, TokenizeChat), TokenizedBody)
DETOKENIZE = _asked((DetokenizeRequest,), DetokenizedBody)
HEALTH, READY = _told(StatusBody), _told(StatusBody, 503)
MODELS, MODEL, VERSIONS = _told(ModelList), _told(ModelCard), _told(VersionBody)


def document(app: FastAPI, names: Iterable[str]) -> Json:
    """The document of an application's routes. names: the served models'."""
    spec = get_openapi(title=app.title, version=VERSION, openapi_version=_OPENAPI, routes=app.routes)
    kinds = [(kind, "validation") for kind in _REQUESTS] + [(kind, "serialization") for kind in (ChatChunk, TextChunk)]
    _, shared = models_json_schema(kinds, ref_template=_reference("{model}"))  # type: ignore[arg-type]
    schemas: Json = shared["$defs"]
    for kind in _REQUESTS:
        fields = schemas[kind.__name__]["properties"]
        served: Json = {"enum": list(names)}
        fields["model"] = served if kind in _SAMPLED else {"anyOf": [served, {"type": "null"}]}
        schemas[kind.__name__]["properties"] = _properties(fields, kind in _SAMPLED)
    spec["components"]["schemas"] |= schemas
    return spec


def _properties(stated: Json, sampled: bool) -> Json:
    """The fields of a request as `parse` reads them: with null for a default, and those that are not served."""
    fields = {
        name: {"anyOf": [schema, {"type": "null"}]} if name in NULL_IS_DEFAULT else schema
        for name, schema in stated.items()
    }
    if not sampled:
        return fields
    ignored = {name: {"description": "Read, and changes nothing."} for name in IGNORED}
    refused = {
        name: {"enum": list(neutral), "description": "Not served: taken where it asks for nothing."}
        for name, neutral in NOT_SERVED.items()
    }
    return fields | ignored | refused
