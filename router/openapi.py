"""The service's OpenAPI document: requests and responses of all addresses.

The models here only describe. `router.schema.parse` reads request bodies and `router.responses` writes responses.
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
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChat,
    TokenizeText,
)

VERSION = "0.1.0"  # as in pyproject.toml, which is not part of an installed service

# The same for every model, as in vLLM.
PERMISSION = {
    "object": "model_permission",
    "allow_create_engine": False,
    "allow_sampling": True,
    "allow_logprobs": True,
    "allow_search_indices": False,
    "allow_view": True,
    "allow_fine_tuning": False,
    "organization": "*",
    "group": None,
    "is_blocking": False,
}

_OPENAPI = "3.2.0"  # the first version that describes events of a stream

Json = dict[str, Any]
FinishReason = Literal["stop", "length", "abort"]
_REQUESTS = (ChatRequest, CompletionRequest, TokenizeText, TokenizeChat, DetokenizeRequest)
_SAMPLED = (ChatRequest, CompletionRequest)


class Error(BaseModel):
    """param: the request's field at fault. choices: the tokens generated before the error."""

    message: str
    type: str
    param: str | None
    code: str | None
    request_id: str
    choices: list[Json] | None = None


class ErrorBody(BaseModel):
    """The body of every error response, and the last event of a stream that fails."""

    error: Error


class TokenDetails(BaseModel):
    """Kinds of completion tokens."""

    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class PromptTokenDetails(BaseModel):
    """Kinds of prompt tokens. cached_tokens: copied from the cache of a session with the same beginning."""

    cached_tokens: int


class UsageBody(BaseModel):
    """Token counts; a prompt counts once for all its choices. Chunks before the last have the first three only."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokenDetails | None = None
    completion_tokens_details: TokenDetails | None = None
    guidance: dict[str, float] | None = None
    speculation: dict[str, float] | None = None


class Metrics(BaseModel):
    """Times of one answer, if the request set `include_metrics`; null where it has too few tokens."""

    time_to_first_token_ms: float | None
    generation_time_ms: float | None
    queue_time_ms: float
    mean_itl_ms: float | None
    tokens_per_second: float | None


class Candidate(BaseModel):
    """A likely token of one distribution."""

    id: int
    text: str
    probability: float


class ExplainedToken(BaseModel):
    """The effect of guidance on one token; without scores and candidates if the token was forced.

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
    """The tokens of a choice if the request set `guidance.explain`."""

    tokens: list[ExplainedToken]


class Choice(BaseModel):
    """Common fields of choices. token_ids: if the request set `return_token_ids`."""

    index: int
    logprobs: Json | None
    finish_reason: FinishReason | Literal["tool_calls"] | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    guidance: Explanation | None = None


class CalledFunction(BaseModel):
    """The function of a tool call. arguments: JSON."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call of one of the request's tools."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class FunctionPart(BaseModel):
    """The next part of a call's function. arguments: a part of its JSON."""

    name: str | None = None
    arguments: str


class ToolCallPart(BaseModel):
    """The next part of the call with this index. Its first part has the id, the type and the name."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionPart


class Message(BaseModel):
    """The answer. reasoning: the thinking, under both of its usual names; absent without thinking.

    content: null beside tool calls without text. tool_calls: absent without calls.
    """

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[ToolCall] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None


class MessagePart(BaseModel):
    """The next part of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallPart] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class ChatChoice(Choice):
    """One answer."""

    message: Message


class ChatChunkChoice(Choice):
    """The next part of one answer."""

    delta: MessagePart


class TextChoice(Choice):
    """One continuation, or in a chunk its next part."""

    text: str
    reasoning: str | None = None
    prompt_token_ids: list[int] | None = None


class Answer(BaseModel):
    """Common fields of answers. metrics: of a stream in its last chunk."""

    id: str
    created: int
    model: str
    seed: int
    metrics: Metrics | None = None


class ChatAnswer(Answer):
    """The response of /v1/chat/completions."""

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
    """The response of /v1/completions."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: UsageBody


class TextChunk(Answer):
    """An event of a streamed completion."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: UsageBody | None = None


class TokenizedBody(BaseModel):
    """The response of /tokenize. max_model_len: maximum tokens of prompt and answer together."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizedBody(BaseModel):
    """The response of /detokenize."""

    prompt: str


class ModelPermission(BaseModel):
    """Permissions of clients on a model; the same for every model."""

    id: str
    object: Literal["model_permission"]
    created: int
    allow_create_engine: bool
    allow_sampling: bool
    allow_logprobs: bool
    allow_search_indices: bool
    allow_view: bool
    allow_fine_tuning: bool
    organization: str
    group: str | None
    is_blocking: bool


class ModelCard(BaseModel):
    """One served model. root: its own name, not the path of its files."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    permission: list[ModelPermission]


class ModelList(BaseModel):
    """All served models."""

    object: Literal["list"]
    data: list[ModelCard]


class StatusBody(BaseModel):
    """State of the service. missing: roles that are not connected. awaited: what they wait for."""

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
    """Route arguments for a handler that parses the request's body itself, as one of these models."""
    schemas = [_reference(body.__name__) for body in bodies]
    content = {"application/json": {"schema": schemas[0] if len(schemas) == 1 else {"oneOf": schemas}}}
    return {"openapi_extra": {"requestBody": {"required": True, "content": content}}}


def _streams(chunk: type[BaseModel]) -> Json:
    """Route arguments for a handler that can also stream events: chunks or an error, then [DONE]."""
    body = {"anyOf": [_reference(chunk.__name__), _reference(ErrorBody.__name__)]}
    event = {"contentMediaType": "application/json", "contentSchema": body}
    data = {"type": "string", "anyOf": [{"const": "[DONE]"}, event]}
    item = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {"responses": {200: {"content": {"text/event-stream": {"itemSchema": item}}}}}


# Arguments of `app.post` beside `response_model`.
CHAT = _reads(ChatRequest) | _streams(ChatChunk)
COMPLETIONS = _reads(CompletionRequest) | _streams(TextChunk)
TOKENIZE = _reads(TokenizeText, TokenizeChat)
DETOKENIZE = _reads(DetokenizeRequest)


def document(app: FastAPI, names: Iterable[str]) -> Json:
    """The OpenAPI document of an application's routes. names: the served models."""
    spec = get_openapi(title=app.title, version=VERSION, openapi_version=_OPENAPI, routes=app.routes)
    # FastAPI knows neither the bodies that handlers parse nor the chunks of a stream.
    models = [(body, "validation") for body in _REQUESTS] + [(ChatChunk, "serialization"), (TextChunk, "serialization")]
    _, shared = models_json_schema(models, ref_template=_reference("{model}")["$ref"])  # type: ignore[arg-type]
    schemas: Json = spec["components"]["schemas"]
    schemas |= shared["$defs"]
    for body in _REQUESTS:
        schema, sampled = schemas[body.__name__], body in _SAMPLED
        fields = schema["properties"]
        fields["model"] = {"enum": list(names)}
        for name in fields.keys() - set(schema.get("required", ())):
            fields[name] = {"anyOf": [fields[name], {"type": "null"}]}
        for name in IGNORED if sampled else ():
            fields.setdefault(name, {"description": "Accepted, without effect."})
        for name, neutral in NOT_SERVED.items() if sampled else ():
            fields.setdefault(
                name, {"enum": list(neutral), "description": "Not supported: only the default is accepted."}
            )
    return spec
