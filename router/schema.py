"""The requests' bodies: fields, types and neutral values. What the values mean is decided in `router.convert`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from router.backend import BadRequest

# Fields of the OpenAI API or of vLLM that are read and change nothing, as there.
IGNORED = ("metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier")

# Fields that are known and not served, with the values at which they ask for nothing.
NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "echo": (None, False),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1, 1.0),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
    "documents": (None, []),
    "chat_template": (None,),
    "mm_processor_kwargs": (None, {}),
    "allowed_token_ids": (None, []),
    "bad_words": (None, []),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "truncate_prompt_tokens": (None,),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "return_token_ids": (None, False),
    "priority": (None, 0),
}

MAX_LOGPROBS = 20  # candidates of one token, as in the OpenAI API and vLLM
MAX_CHOICES = 128  # `n` of one prompt, as in the OpenAI API


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class GuidanceFields(_Body):
    """Overrides of the service's guidance, and whether to explain each token."""

    alpha: float | None = None
    warmup_tokens: int | None = None
    schedule: list[Annotated[tuple[int, float], Field(strict=False)]] | None = None  # JSON has lists for pairs
    guide: Literal["always", "thinking"] | None = None
    explain: bool = False


class ThinkingFields(_Body):
    """Overrides of the service's thinking; `max_tokens: null` lifts the service's bound."""

    start: str = ""
    end: str = ""
    max_tokens: int | None = None
    min_tokens: int = 0
    wait: str = ""


class SpeculationFields(_Body):
    """Overrides of the service's speculation. drafts: tokens drafted ahead at most, 0 for none, null as configured."""

    drafts: int | None = Field(None, ge=0, le=8)
    drafter: Literal["auto", "guider"] | None = None


class StreamOptions(_Body):
    """include_usage: a last chunk with the counts. continuous_usage_stats is vLLM's and not served."""

    include_usage: bool = False
    include_obfuscation: bool = False  # OpenAI's padding against traffic analysis; none is sent
    continuous_usage_stats: Literal[False] = False


class TextPart(_Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One message. An answer of this service can be sent back as it came: its empty fields are accepted."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


class _Request(_Body):
    model: str
    user: str | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    stop_on_repeat: int | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    return_tokens_as_token_ids: bool | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    guidance: GuidanceFields | None = None
    thinking: ThinkingFields | None = None
    speculation: SpeculationFields | None = None

    @property
    def explain(self) -> bool:
        """Whether each token's guidance is returned."""
        return self.guidance is not None and self.guidance.explain


class ChatRequest(_Request):
    """The body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def candidates(self) -> int | None:
        """How many candidates are listed with each token's log-probability; None: no log-probability is wanted."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def prompt_candidates(self) -> int | None:
        """The same of the prompt's tokens."""
        return self.prompt_logprobs


class CompletionRequest(_Request):
    """The body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False

    @property
    def candidates(self) -> int | None:
        """How many candidates are listed with each token's log-probability; None: no log-probability is wanted."""
        return self.logprobs

    @property
    def prompt_candidates(self) -> int | None:
        """The same of the prompt's tokens."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in wanted if count is not None), default=None)


R = TypeVar("R", ChatRequest, CompletionRequest)

_NULL_IS_DEFAULT = frozenset({"n", "stream", "echo", "chat_template_kwargs", "continue_final_message"})


def parse(kind: type[R], body: Any) -> R:
    """The request in a decoded JSON body. Raises BadRequest naming the first field that is wrong."""
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    for name, neutral in NOT_SERVED.items():
        if name in body and name not in kind.model_fields and not any(_same(body[name], value) for value in neutral):
            raise BadRequest(f"{name} is not supported by this service; leave it out", param=name, code="unsupported")
    passed = {*IGNORED, *NOT_SERVED} - kind.model_fields.keys()
    kept = {
        name: value
        for name, value in body.items()
        if name not in passed and not (value is None and name in _NULL_IS_DEFAULT)
    }
    try:
        return kind.model_validate(kept)
    except ValidationError as error:
        raise _refusal(error) from None


def _same(value: Any, neutral: Any) -> bool:
    return type(value) is type(neutral) and bool(value == neutral)  # 0 is not False: `logprobs: 0` asks for some


def _refusal(error: ValidationError) -> BadRequest:
    items = error.errors(include_url=False, include_context=False, include_input=False)
    # A union reports every member that does not fit: what reached deepest is what the client meant.
    item = max(items, key=lambda item: (item["type"] == "extra_forbidden", len(item["loc"])))
    where = ".".join(str(part) for part in item["loc"] if not str(part).startswith(("list[", "constrained-")))
    if item["type"] == "extra_forbidden":
        return BadRequest(f"{where} is not a field of this request", param=where, code="unknown_field")
    if item["type"] == "missing":
        return BadRequest(f"{where} is missing", param=where, code="missing_field")
    return BadRequest(f"{where}: {item['msg']}", param=where)
