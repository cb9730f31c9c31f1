"""Turns a request's body into the sequences that coordinators decode.

Each field of the request overrides the service's default.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar, cast

from pydantic import BaseModel

from actors.api.generation import ROLES, Generate, Role
from actors.api.guidance import Guidance
from actors.api.sampling_params import Sampling, Thinking
from actors.config import Effort, ServiceConfig
from actors.decoding.hashing import derive_seed
from actors.text.tokenizer import RoleTokenizer
from router.backend import BadRequest, NotFound
from router.chat import Prompt, Tokenizers, chat_prompt, opens_turn, text_prompt, token_prompt
from router.context import Budget, context_limits, resolve_max_tokens
from router.prompt_thinking import ThinkingState
from router.schema import ChatRequest, CompletionRequest, SpeculationFields
from router.tools import ToolUse, tool_use

UNSTREAMED_INTERVAL_S = 1.0  # between two messages of an answer that is not streamed: its parts are not needed early
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default for max_tokens of a completion

_CONVERTED = (
    "logit_bias",
    "stop",
    "stop_token_ids",
    "allowed_token_ids",
    "bad_words",
    "top_k",
    "max_tokens",
)  # fields that _sampling converts
_COPIED = tuple(item.name for item in fields(Sampling) if item.name not in _CONVERTED)

UNSTATED_EFFORT = Effort()  # of a request without reasoning_effort: changes nothing

Parameters = TypeVar("Parameters", Guidance, Thinking, Sampling)


@dataclass(frozen=True, slots=True)
class Plan:
    """The sequences of a request in the order of their choices, and the seed from which theirs derive.

    echoes: text of each prompt if answers begin with it, else empty. tools: that the answers may call.
    """

    sequences: list[Generate]
    seed: int
    choices_per_prompt: int
    echoes: Sequence[str] = ()
    tools: ToolUse | None = None

    @property
    def primary(self) -> Role:
        """The role whose vocabulary the answers are in."""
        return self.sequences[0].primary

    @property
    def echo(self) -> list[str]:
        """By choice the prompt that its text begins with; empty without echo."""
        return [text for text in self.echoes for _ in range(self.choices_per_prompt)]

    @property
    def prompts(self) -> list[list[int]]:
        """By choice the prompt, in ids of the primary role."""
        return [sequence.prompts[sequence.primary] for sequence in self.sequences]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts; each counts once, independent of its number of choices."""
        return sum(map(len, self.prompts[:: self.choices_per_prompt]))

    @property
    def max_total_tokens(self) -> int:
        """Maximum total of tokens of all sequences, prompts and answers."""
        return sum(len(s.prompts[s.primary]) + (s.sampling.max_tokens or 0) for s in self.sequences)

    def with_grammar(self, grammar: str) -> Plan:
        """The same plan with a grammar, which was checked before, of all answers."""
        return replace(self, sequences=[replace(sequence, grammar=grammar) for sequence in self.sequences])

    def with_tools(self, tools: ToolUse, tokenizer: RoleTokenizer) -> Plan:
        """The same plan for answers that may call tools. tokenizer: of the primary role."""
        shown = tools.marks(tokenizer)
        return replace(self, sequences=[replace(one, shown_specials=shown) for one in self.sequences], tools=tools)

    def for_client(self, client: str, trace_id: str = "") -> Plan:
        """The same plan on behalf of a client. trace_id: of the client's trace, "" without one."""
        return replace(self, sequences=[replace(each, client=client, trace_id=trace_id) for each in self.sequences])


def client_id(key: str | None, authorization: str | None, user: str | None) -> str:
    """Identifies the client for fair scheduling. key: name of the verified API key.

    Without a key, an Authorization header identifies the client, and without that `user`; "" for all others. Only a
    hash of the header is used, so that the header appears in no log.
    """
    if key is not None:
        return f"name:{key}"
    if authorization:
        return f"key:{hashlib.sha256(authorization.encode()).hexdigest()[:16]}"
    return f"user:{user}" if user else ""


@dataclass(frozen=True, slots=True)
class _ServedModel:
    """The roles and the guidance behind a served name."""

    primary: Role
    guidance: Guidance
    roles: tuple[Role, ...]  # roles that need a prompt


def plan_chat(request: ChatRequest, service: ServiceConfig, tokenizers: Tokenizers, request_id: str) -> Plan:
    """The sequences of a chat request. Raises BadRequest or NotFound."""
    effort = _effort(request, service)
    model = _model(request, service, effort)
    thinking, marks = _thinking(request, service.thinking, effort), "start" in _set_fields(request.thinking)
    thinks = _thinks(request, effort)
    closes = not (thinks or marks)
    variables = _template_variables(request, thinks) | request.chat_template_kwargs
    request = request.model_copy(update={"chat_template_kwargs": variables})
    # A continued answer has already opened its thinking, or has none, unless the request itself gives the mark.
    opens = opens_turn(request) or marks
    if request.top_logprobs and not request.logprobs:
        raise BadRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    tools = tool_use(request, service.models.role(model.primary), tokenizers[model.primary])
    prompt = chat_prompt(request, model.roles, tokenizers, thinking, opens, closes, tools)
    budget = _chat_budget(request, service.default_sampling.max_tokens)
    plan = _plan(request, service, tokenizers, request_id, model, thinking, [prompt], budget)
    return plan if tools is None else plan.with_tools(tools, tokenizers[model.primary])


def plan_completion(
    request: CompletionRequest, service: ServiceConfig, tokenizers: Tokenizers, request_id: str
) -> Plan:
    """The sequences of a completion request. Raises BadRequest or NotFound."""
    model = _model(request, service)
    # Raw text has no marked thinking unless the request says how it is marked.
    if request.thinking is None and (request.thinking_token_budget or 0) > 0:
        raise BadRequest("raw text has thinking only if thinking.start says so", param="thinking_token_budget")
    thinking = None if request.thinking is None else _thinking(request, service.thinking)
    closes = request.thinking_token_budget == 0
    prompts = [
        text_prompt(prompt, model.roles, tokenizers, thinking, request.add_special_tokens, closes)
        if isinstance(prompt, str)
        else token_prompt(prompt, model.primary, model.roles, tokenizers, thinking, closes)
        for prompt in _prompt_list(request)
    ]
    if request.max_tokens == 0 and not request.echo and request.prompt_logprobs is None:
        raise BadRequest("max_tokens: 0 leaves nothing to answer without echo or prompt_logprobs", param="max_tokens")
    if request.max_tokens == 0 and request.min_tokens:
        raise BadRequest("min_tokens asks for an answer, and max_tokens: 0 for none", param="min_tokens")
    budget = Budget(request.max_tokens, service.default_sampling.max_tokens or DEFAULT_COMPLETION_TOKENS)
    plan = _plan(request, service, tokenizers, request_id, model, thinking or Thinking(), prompts, budget)
    return replace(plan, echoes=_echoes(request, tokenizers[model.primary], prompts))


def _plan(
    request: ChatRequest | CompletionRequest,
    service: ServiceConfig,
    tokenizers: Tokenizers,
    request_id: str,
    model: _ServedModel,
    thinking: Thinking,
    prompts: Sequence[Prompt],
    budget: Budget,
) -> Plan:
    if request.prompt_logprobs is not None and request.stream:
        raise BadRequest("prompt_logprobs come with whole answers alone: leave out stream", param="prompt_logprobs")
    only_prompt = budget.requested == 0 and isinstance(request, CompletionRequest)
    if budget.requested is not None and budget.requested < 1 and not only_prompt:
        raise BadRequest(f"{budget.param} must be at least 1, not {budget.requested}", param=budget.param)
    _check_count(len(prompts) * request.n, service)
    if request.stream_options is not None and not request.stream:
        raise BadRequest("stream_options are for stream: true alone", param="stream_options")
    if not request.spaces_between_special_tokens and tokenizers[model.primary].spaces_added:
        raise BadRequest("this model's decoder always puts those spaces", param="spaces_between_special_tokens")
    bounds = context_limits(service, tokenizers, model.primary, model.roles)
    seed = (
        request.seed if request.seed is not None else secrets.randbits(53)
    )  # 53 bits: exact as a JSON number in every client
    # Clients may repeat their request id, and it may have any characters; this one is for logs.
    unique = f"{ascii(request_id)[1:-1]}.{secrets.token_hex(4)}"
    speculation = request.speculation or SpeculationFields()
    sequences: list[Generate] = []
    words = _encode_words(request.bad_words, tokenizers[model.primary])
    samplings: dict[int, Sampling] = {}  # by max_tokens; all other fields are the same
    for prompt in prompts:
        if not all(prompt.ids.values()):
            raise BadRequest("the prompt is empty: there is no token to begin with", param="prompt")
        most = max(resolve_max_tokens(prompt.ids, bounds, budget), int(only_prompt))
        if most not in samplings:
            samplings[most] = _sampling(request, service.default_sampling, most, words)
            _check_ids(samplings[most], tokenizers[model.primary].width)
        sampling = samplings[most]
        guidance = model.guidance
        if prompt.state is ThinkingState.CLOSED and guidance.guide == "thinking":
            guidance = Guidance(alpha=0.0)  # there is no thinking to guide
        ids = {model.primary: prompt.ids[model.primary]} if guidance.never_guides() else prompt.ids
        marked = thinking if prompt.state is ThinkingState.OPEN else replace(thinking, start="")
        for _ in range(request.n):
            index = len(sequences)
            sequences.append(
                Generate(
                    request_id=f"{unique}.{index}",
                    primary=model.primary,
                    prompts=ids,
                    sampling=sampling,
                    guidance=guidance,
                    thinking=marked,
                    seed=derive_seed(seed, index),
                    explain=request.explain,
                    logprobs=request.candidates,
                    prompt_logprobs=request.prompt_candidates,
                    only_prompt=only_prompt,
                    drafts=speculation.drafts,
                    drafter=speculation.drafter or "auto",
                    interval_s=0.0 if request.stream else UNSTREAMED_INTERVAL_S,
                    priority=request.priority,
                )
            )
    return Plan(sequences, seed, request.n)


def _echoes(request: CompletionRequest, tokenizer: RoleTokenizer, prompts: Sequence[Prompt]) -> list[str]:
    """The text of each prompt if the request sets echo, else empty."""
    if not request.echo:
        return []
    texts = [p if isinstance(p, str) else tokenizer.decode(p, skip_special=False) for p in _prompt_list(request)]
    return [text + prompt.added for text, prompt in zip(texts, prompts, strict=True)]


def _model(
    request: ChatRequest | CompletionRequest, service: ServiceConfig, effort: Effort = UNSTATED_EFFORT
) -> _ServedModel:
    served = resolve_model(service, request.model)
    default = service.guidance
    if served != "guided":
        default = Guidance(alpha=0.0)
    elif effort.alpha is not None:
        default = replace(default, alpha=effort.alpha, schedule=())  # a schedule would override the effort's alpha
    guidance = _guidance(request, default)
    if served != "guided" and not guidance.never_guides():
        raise BadRequest(
            f"{request.model} is one model alone, which nothing guides: ask {service.name} for guidance",
            param="guidance",
        )
    primary = primary_role(served)
    return _ServedModel(primary, guidance, (primary,) if guidance.never_guides() else ROLES)


def resolve_model(service: ServiceConfig, name: str | None) -> Role | Literal["guided"]:
    """The role behind a served name, or "guided", also without a name. Raises NotFound."""
    return require_model(service, name) if name else "guided"


def require_model(service: ServiceConfig, name: str) -> Role | Literal["guided"]:
    """The role behind a served name, or "guided". Raises NotFound."""
    if name not in service.served_names:
        served = ", ".join(service.served_names)
        raise NotFound(f"there is no model {name!r}; served are {served}", param="model", code="model_not_found")
    return service.served_names[name]


def primary_role(served: Role | Literal["guided"]) -> Role:
    """The role whose vocabulary the answers are in."""
    return "target" if served == "guided" else served


def _guidance(request: ChatRequest | CompletionRequest, default: Guidance) -> Guidance:
    if request.guidance is None:
        return default
    given = request.guidance.model_dump(exclude_none=True, exclude={"explain"})
    if "schedule" in given:
        given["schedule"] = tuple((start, alpha) for start, alpha in given["schedule"])
    elif "alpha" in given:
        given["schedule"] = ()  # the service's schedule would override the request's alpha
    return _override(default, given, "guidance")


def _effort(request: ChatRequest, service: ServiceConfig) -> Effort:
    """The configured effort that a chat request names. Raises BadRequest if there is none of that name."""
    if request.reasoning_effort is None:
        return UNSTATED_EFFORT
    effort = service.efforts.get(request.reasoning_effort)
    if effort is None:
        message = f"reasoning_effort: {request.reasoning_effort!r} is none of {', '.join(service.efforts)}"
        raise BadRequest(message, param="reasoning_effort")
    return effort


def _thinks(request: ChatRequest, effort: Effort) -> bool:
    """False if a chat request asks for an answer without thinking. Its own limit wins over that of its effort."""
    if request.thinking_token_budget is not None:
        return request.thinking_token_budget != 0
    return effort.thinking_tokens != 0 or "max_tokens" in _set_fields(request.thinking)


def _template_variables(request: ChatRequest, thinks: bool) -> dict[str, Any]:
    """The variables by which chat templates learn of the thinking that a request asks for; none if it does not say."""
    if request.reasoning_effort is not None:
        return {"enable_thinking": thinks, "reasoning_effort": request.reasoning_effort}
    return {} if thinks else {"enable_thinking": False}


def _thinking(
    request: ChatRequest | CompletionRequest, default: Thinking, effort: Effort = UNSTATED_EFFORT
) -> Thinking:
    given, budget = _set_fields(request.thinking), request.thinking_token_budget
    if budget is not None:
        if "max_tokens" in given:
            raise BadRequest("thinking.max_tokens is the same limit: send one", param="thinking_token_budget")
        given["max_tokens"] = budget if budget > 0 else None  # 0: there is no thinking to limit
    elif effort.thinking_tokens and "max_tokens" not in given:
        given["max_tokens"] = max(effort.thinking_tokens, given.get("min_tokens", default.min_tokens))
    return _override(default, given, "thinking")


def _set_fields(fields: BaseModel | None) -> dict[str, Any]:
    return {} if fields is None else fields.model_dump(exclude_unset=True)


def _encode_words(words: list[str] | None, tokenizer: RoleTokenizer) -> tuple[tuple[int, ...], ...] | None:
    """Token ids of words, both at the beginning of a text and after a space."""
    if words is None:
        return None
    spelled = (tuple(tokenizer.encode_continuation(text)) for word in words for text in (word, f" {word.lstrip()}"))
    return tuple(dict.fromkeys(spelled))


def _sampling(
    request: ChatRequest | CompletionRequest,
    default: Sampling,
    max_tokens: int,
    bad_words: tuple[tuple[int, ...], ...] | None,
) -> Sampling:
    given: dict[str, Any] = {name: getattr(request, name) for name in _COPIED}
    given["top_k"] = 0 if request.top_k == -1 else request.top_k
    given["stop"] = (request.stop,) if isinstance(request.stop, str) else _tuple(request.stop)
    given["stop_token_ids"] = _tuple(request.stop_token_ids)
    given["allowed_token_ids"] = _tuple(request.allowed_token_ids)
    given["bad_words"] = bad_words
    given["logit_bias"] = None if request.logit_bias is None else _parse_logit_bias(request.logit_bias)
    given["max_tokens"] = max_tokens
    return _override(default, {name: value for name, value in given.items() if value is not None}, "")


def _override(default: Parameters, given: Mapping[str, Any], section: str) -> Parameters:
    try:
        return replace(default, **given)
    except ValueError as error:
        raise _bad_request(str(error), list(given), section) from None


def _bad_request(message: str, given: Sequence[str], section: str) -> BadRequest:
    named = [name for name in given if re.search(rf"\b{name}\b", message)]
    param = ".".join(part for part in (section, *named[:1]) if part)
    return BadRequest(f"{section}: {message}" if section else message, param=param or None)


def _tuple(values: list[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)


def _parse_logit_bias(bias: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    ids: dict[int, float] = {}
    for key, number in bias.items():
        try:
            ids[int(key)] = number
        except ValueError:
            message = f"logit_bias: {key!r} is not a token id; it maps token ids, as strings, to numbers"
            raise BadRequest(message, param="logit_bias") from None
    return tuple(sorted(ids.items()))


def _check_ids(sampling: Sampling, width: int) -> None:
    named = {
        "logit_bias": [id_ for id_, _ in sampling.logit_bias],
        "stop_token_ids": sampling.stop_token_ids,
        "allowed_token_ids": sampling.allowed_token_ids,
    }
    for param, ids in named.items():
        for id_ in ids:
            if not 0 <= id_ < width:
                raise BadRequest(f"{param}: token id {id_} is outside the vocabulary of {width} ids", param=param)


def _check_count(sequences: int, service: ServiceConfig) -> None:
    coordinator = service.coordinator
    most = (coordinator.max_sessions + coordinator.max_waiting) * coordinator.replicas.max
    if sequences > most:
        raise BadRequest(f"{sequences} answers in one request, but the service holds {most}: send fewer", param="n")


def _chat_budget(request: ChatRequest, default: int | None) -> Budget:
    old, new = request.max_tokens, request.max_completion_tokens
    return Budget(old, default) if new is None else Budget(new, default, "max_completion_tokens")


def _prompt_list(request: CompletionRequest) -> list[str | list[int]]:
    prompt = request.prompt
    if not prompt and isinstance(prompt, list):
        raise BadRequest("prompt is an empty list", param="prompt")
    one = isinstance(prompt, str) or isinstance(prompt[0], int)
    return cast("list[str | list[int]]", [prompt] if one else prompt)
