"""Request bodies: fields, types and neutral values. `router.request_planning` interprets them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from actors.text.tool_formats import NAME_PATTERN
from router.backend import BadRequest
from router.request_id import MAX_CHARACTERS

# Fields of the OpenAI API that are accepted and have no effect.
IGNORED = (
    *("metadata", "store", "safety_identifier", "service_tier"),
    *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
    "prediction",  # a text that only makes OpenAI's service faster
)

# Fields that are known but not supported, with the values that are accepted because they request nothing.
NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "logprob_token_ids": (None,),
    "echo": (None, False),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "moderation": (None,),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
    "documents": (None, []),
    "chat_template": (None,),
    "media_io_kwargs": (None, {}),
    "mm_processor_kwargs": (None, {}),
    "prompt_embeds": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "truncate_prompt_tokens": (None,),
    "truncation_side": (None,),
    "session_id": (None,),
    "cache_salt": (None,),
    "kv_transfer_params": (None,),
    "ec_transfer_params": (None,),
    "vllm_xargs": (None, {}),
    "repetition_detection": (None,),
    "watermarking": (None, False),
    "stream_interval": (None, 1),
    "routed_experts_prompt_start": (None, 0),
    "return_token_offsets": (None, False),
    "return_prompt_text": (None, False),
    "return_mm_kwargs": (None, True),
}

# Fields that request nothing if the other field of the pair is "none": templates get no functions either way.
DECLINED = {"functions": "function_call"}

MAX_LOGPROBS = 20  # candidates of one token, as in the OpenAI API and vLLM
_MOST_ERRORS = 1_000  # of a body that are compared to find the one to name
MAX_BIASES = 1_024  # ids in logit_bias
MAX_TOOLS = 128  # as in the OpenAI API
MAX_CHOICES = 128  # `n` of one prompt, as in the OpenAI API


# The coordinator processes these at every token of a session; the bounds keep one client from delaying all others.
ShortText = Annotated[str, Field(max_length=1_024)]
FewIds = Annotated[list[int], Field(max_length=1_024)]
Count = Annotated[int, Field(lt=2**63)]
FunctionName = Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]


def _few(items: Any) -> Any:
    """Refuse a long object before each of its values is checked."""
    if isinstance(items, dict) and len(items) > MAX_BIASES:
        raise PydanticCustomError(
            "too_long", "at most {most} items, not {count}", {"most": MAX_BIASES, "count": len(items)}
        )
    return items


class _Body(BaseModel):
    """Converts as vLLM does: 5.0 and "5" to 5, "true" to true; never a number to a text."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _MessageBody(_Body):
    """A part of a message or a tool. Clients send fields of their own in them: unknown ones are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class GuidanceFields(_Body):
    """Overrides the service's guidance. explain: return an explanation of each token."""

    alpha: float | None = None
    warmup_tokens: Count | None = None
    schedule: list[tuple[Count, float]] | None = Field(None, max_length=256)
    guide: Literal["always", "thinking"] | None = None
    explain: bool = False


class ThinkingFields(_Body):
    """Overrides the service's thinking; `max_tokens: null` lifts the service's limit."""

    start: ShortText = ""
    end: ShortText = ""
    max_tokens: Count | None = None
    min_tokens: Count = 0
    wait: ShortText = ""
    closing: ShortText = ""


class SpeculationFields(_Body):
    """Overrides the service's speculation. drafts: maximum tokens per draft; 0: none; null: as configured."""

    drafts: int | None = Field(None, ge=0, le=8)
    drafter: Literal["auto", "guider"] | None = None


class JsonSchemaFormat(_Body):
    """A JSON schema that the answer obeys, whether `strict` is set or not."""

    name: ShortText = ""
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    """The form of the answer behind its thinking."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(_Body):
    """The form of the answer behind its thinking, as in vLLM: exactly one of the first five fields."""

    json_: str | dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[ShortText], Field(min_length=1, max_length=1_024)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: Literal[False] = False
    whitespace_pattern: None = None
    structural_tag: None = None


class FunctionBody(_MessageBody):
    """A function that the model may call. parameters: a JSON schema of its arguments; null: it takes none.

    strict: the arguments obey the schema, also where the model chooses to call.
    """

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_MessageBody):
    """A function that the model may call, in OpenAI's form."""

    type: Literal["function"]
    function: FunctionBody


class ChosenFunction(_MessageBody):
    """The name of a function."""

    name: FunctionName


class NamedTool(_MessageBody):
    """A function that must be called."""

    type: Literal["function"]
    function: ChosenFunction


class AllowedTools(_MessageBody):
    """Functions to which a request is limited."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedToolChoice(_MessageBody):
    """OpenAI's choice among a part of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class StreamOptions(_Body):
    """include_usage: add a last chunk with the counts. continuous_usage_stats: also add counts to every chunk."""

    include_usage: bool = False
    include_obfuscation: bool = False  # OpenAI's padding against traffic analysis; not sent
    continuous_usage_stats: bool = False


class TextPart(_MessageBody):
    """A part of a message's content. Accepts a plain text, and the names of a text in OpenAI's newer API."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, part: Any) -> Any:
        """Report the unsupported kind of a part rather than its first missing field."""
        if isinstance(part, str):
            return {"type": "text", "text": part}
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("input_text", "output_text"):
            return {**part, "type": "text"}
        if kind == "refusal":
            return {"type": "text", "text": part.get("refusal")}
        if isinstance(kind, str) and kind != "text":
            raise PydanticCustomError(
                "not_text", "a part of type {kind} is not supported: models read text", {"kind": kind[:64]}
            )
        return part


class CalledFunction(_MessageBody):
    """The function of a tool call. arguments: JSON in a string, or an object; "" and null are no arguments."""

    name: ShortText
    arguments: str | dict[str, Any] | None = None


class ToolCall(_MessageBody):
    """A tool call in an earlier message; templates show it to the model."""

    id: ShortText | None = None
    function: CalledFunction


def _thinking_texts(part: dict[str, Any]) -> Iterator[str]:
    """The texts of a part of thinking: one, or Mistral's list of parts."""
    for value in (part.get("thinking"), part.get("reasoning"), part.get("text")):
        for each in value if isinstance(value, list) else [value]:
            text = each.get("text") if isinstance(each, dict) else each
            if isinstance(text, str):
                yield text


_THINKING_PARTS = ("thinking", "reasoning", "redacted_thinking")


class ChatMessage(_MessageBody):
    """One message. role: as the chat template takes it. reasoning: the thinking, under any of its usual names, or in
    parts of its content.

    function_call: a tool call in OpenAI's older form.
    """

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: ShortText | None = None
    tool_call_id: ShortText | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    thinking: str | None = None
    function_call: CalledFunction | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=1_024, fail_fast=True)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _thinking_apart(cls, message: Any) -> Any:
        """Move the thinking from the parts of an assistant's content, where Mistral's and Anthropic's SDKs have it."""
        content = message.get("content") if isinstance(message, dict) and message.get("role") == "assistant" else None
        if not isinstance(content, list):
            return message
        apart = [part for part in content if isinstance(part, dict) and part.get("type") in _THINKING_PARTS]
        if not apart:
            return message
        texts = [text for part in apart for text in _thinking_texts(part)]
        rest = [part for part in content if not isinstance(part, dict) or part.get("type") not in _THINKING_PARTS]
        return ({"reasoning": "".join(texts)} if texts else {}) | message | {"content": rest}


class Conversation(_Body):
    """Messages, and options for rendering them with the chat template."""

    messages: list[ChatMessage] = Field(min_length=1, fail_fast=True)
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool = False
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS, fail_fast=True)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedToolChoice | None = None


def _id_for_header(request_id: str) -> str:
    """Refuse an id that a header cannot have: responses return it in one."""
    if not request_id.isprintable() or request_id.strip() != request_id:
        raise PydanticCustomError("not_printable", "a request id has no control characters and no spaces at its ends")
    return request_id


class _Request(_Body):
    model: str | None = None  # the service's own name
    user: str | None = None
    request_id: (
        Annotated[str, Field(min_length=1, max_length=MAX_CHARACTERS), AfterValidator(_id_for_header)] | None
    ) = None
    include_metrics: bool = False
    priority: int = Field(0, ge=-(2**31), lt=2**31)  # lower is sooner
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], BeforeValidator(_few)] | None = None
    min_tokens: Count | None = None
    max_tokens: Count | None = None
    stop: ShortText | Annotated[list[ShortText], Field(max_length=64)] | None = None
    stop_token_ids: FewIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    stop_on_repeat: Count | None = None
    allowed_token_ids: FewIds | None = None
    bad_words: list[ShortText] | None = Field(None, max_length=1_024)
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool = True
    return_token_ids: bool = False
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    return_tokens_as_token_ids: bool | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    guidance: GuidanceFields | None = None
    thinking: ThinkingFields | None = None
    speculation: SpeculationFields | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    thinking_token_budget: int | None = Field(None, ge=-1, lt=2**63)  # -1: no limit

    @property
    def explain(self) -> bool:
        """True if the response explains each token."""
        return self.guidance is not None and self.guidance.explain


class ChatRequest(Conversation, _Request):
    """The body of POST /v1/chat/completions."""

    max_completion_tokens: Count | None = None
    reasoning_effort: ShortText | None = None  # a value that the service's configuration lists
    include_reasoning: bool = True
    parallel_tool_calls: bool = True
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def candidates(self) -> int | None:
        """Candidates per token's log-probability; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def prompt_candidates(self) -> int | None:
        """Candidates per prompt token's log-probability; None: no log-probabilities."""
        return self.prompt_logprobs


class CompletionRequest(_Request):
    """The body of POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(fail_fast=True)]
        | Annotated[list[StrictInt], Field(fail_fast=True)]
        | Annotated[list[Annotated[list[StrictInt], Field(fail_fast=True)]], Field(fail_fast=True)]
    )
    add_special_tokens: bool = True
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False

    @property
    def candidates(self) -> int | None:
        """Candidates per token's log-probability; None: no log-probabilities."""
        return self.logprobs

    @property
    def prompt_candidates(self) -> int | None:
        """Candidates per prompt token's log-probability; None: no log-probabilities."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in wanted if count is not None), default=None)


class TokenizeText(_Body):
    """The body of POST /tokenize for raw text."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChat(Conversation):
    """The body of POST /tokenize for a conversation: the same prompt as a chat request's."""

    model: str | None = None
    return_token_strs: bool = False


class DetokenizeRequest(_Body):
    """The body of POST /detokenize."""

    tokens: list[int] = Field(fail_fast=True)
    model: str | None = None


R = TypeVar("R", bound=_Body)


def parse(kind: type[R], body: Any) -> R:
    """The request in a decoded JSON body; at its top level null means the default, also for unknown fields.

    Raises BadRequest that names a field at fault.
    """
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    given = {name: value for name, value in body.items() if value is not None and name not in _declined(body)}
    for name, neutral in NOT_SERVED.items():
        served = name not in given or name in kind.model_fields
        if not served and not any(_equal_with_type(given[name], value) for value in neutral):
            raise BadRequest(f"{name} is not supported by this service; leave it out", param=name, code="unsupported")
    passed = {*IGNORED, *NOT_SERVED} - kind.model_fields.keys()
    try:
        return kind.model_validate({name: value for name, value in given.items() if name not in passed})
    except ValidationError as error:
        raise _bad_request(error, given) from None


def _declined(body: dict[str, Any]) -> set[str]:
    return {name for name, choice in DECLINED.items() if body.get(choice) == "none"}


def _equal_with_type(value: Any, neutral: Any) -> bool:
    # 0 is not False: `logprobs: 0` requests log-probabilities
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _bad_request(error: ValidationError, body: dict[str, Any]) -> BadRequest:
    """The error of one field. A union reports an error for every member; the client meant the one that fits best."""
    items = error.errors(include_url=False, include_context=False, include_input=False)[:_MOST_ERRORS]
    places = {id(item): _path(item, body) for item in items}

    def fits(item: ErrorDetails) -> tuple[bool, int, bool]:
        return item["type"] == "extra_forbidden", len(places[id(item)]), not item["type"].endswith("_type")

    item = max(items, key=fits)
    path = places[id(item)]
    location = ".".join(path)
    if item["type"] == "extra_forbidden":
        return BadRequest(f"{location} is not a field of this request", param=location, code="unknown_field")
    if item["type"] == "missing":
        return BadRequest(f"{location} is missing", param=location, code="missing_field")
    if item["type"] == "none_required":
        return BadRequest(
            f"{location} is not supported by this service; leave it out", param=location, code="unsupported"
        )
    messages = dict.fromkeys(each["msg"] for each in items if places[id(each)] == path and fits(each) == fits(item))
    return BadRequest(f"{location}: {' or '.join(messages)}", param=location)


def _path(item: ErrorDetails, body: Any) -> list[str]:
    """The keys and indices in the body that lead to an error, without pydantic's names of a union's members."""
    path: list[str] = []
    value = body
    for part in item["loc"]:
        at_index = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if at_index or (isinstance(value, dict) and part in value):
            path.append(str(part))
            value = value[part]
    return [*path, str(item["loc"][-1])] if item["type"] == "missing" else path
