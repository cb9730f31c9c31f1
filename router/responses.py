"""Writes response bodies: whole answers and chunks of streams, for chats and for completions."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from actors.api.generation import Delta, Finished, Usage
from router.logprobs import Note, TextOffsets, TokenFormatter
from router.tool_calls import ToolCallFormat
from router.tool_parser import ToolParser

Json = dict[str, Any]

# Keys that vLLM's answers always have. Here they are null unless the request asks for what they hold.
_ANSWER_KEYS = ("service_tier", "system_fingerprint", "kv_transfer_params", "ec_transfer_params", "metrics")
_CHOICE_KEYS = ("token_ids", "routed_experts")
_MESSAGE_KEYS = ("refusal", "annotations", "audio", "function_call")


@dataclass(frozen=True, slots=True)
class CompletedChoice:
    """One choice with its whole text and its end."""

    delta: Delta
    end: Finished


@dataclass(frozen=True, slots=True)
class StreamedChoice:
    """The state of one choice's stream. parser: reads its tool calls; None without tools."""

    offsets: TextOffsets
    parser: ToolParser | None


@dataclass(frozen=True)
class BodyFormat(ABC):
    """Common parts of one request's bodies; the two subclasses write a choice.

    explain: add an explanation of each token. logprobs: candidates per token's log-probability; None: no
    log-probabilities. prompt_logprobs: the same for the prompt's tokens, in a field of their own. echo: by choice the
    prompt that its text begins with; empty without echo. prompts: by choice the prompt's ids, if the request wants ids;
    prompts_in_choices: place them in the choices, not beside them. include_reasoning: False leaves out the thinking's
    text. metrics: computes the request's times from the counts of its choices; None if it wants none.
    calls: reads and writes tool calls; None without tools.
    """

    request_id: str
    model: str
    seed: int
    tokens: TokenFormatter
    explain: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: Sequence[str] = ()
    prompts: Sequence[list[int]] | None = None
    include_reasoning: bool = True
    metrics: Callable[[Sequence[Usage]], Json | None] | None = None
    choices_per_prompt: int = 1
    calls: ToolCallFormat | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    prefix: ClassVar[str]
    object_type: ClassVar[str]
    chunk_type: ClassVar[str]
    prompts_in_choices: ClassVar[bool]
    answer_keys: ClassVar[tuple[str, ...]]  # of whole answers, null without a value
    choice_keys: ClassVar[tuple[str, ...]]  # of their choices, likewise

    def body(self, answers: Sequence[CompletedChoice], prompt_tokens: int) -> Json:
        """The body of a response that is not streamed."""
        choices = [self._whole_choice(index, answer) for index, answer in enumerate(answers)]
        usages = [answer.end.usage for answer in answers]
        whole = self._frame(self.object_type, choices) | self._prompt_logprobs(answers)
        whole |= {"usage": usage_body(usages, prompt_tokens, self.choices_per_prompt)} | self._metrics(usages)
        return _with_keys(whole | self._prompt_ids(0, in_choice=False), self.answer_keys)

    def begin(self, choice: int) -> StreamedChoice:
        """The state of a choice's stream before its first event."""
        return StreamedChoice(self._offsets(choice), self.calls.parser() if self.calls else None)

    def _offsets(self, choice: int) -> TextOffsets:
        """Counts the characters of a choice's tokens."""
        return TextOffsets(self.tokens.tokenizer, self.echo[choice] if self.echo else "")

    def chunk(
        self, choice: int, delta: Delta | None, end: Finished | None, first: bool, stream: StreamedChoice | None = None
    ) -> Json:
        """One event of a stream: the next part of a choice, its end, or both.

        first: True for the choice's first event. stream: has read its earlier events.
        """
        stream, delta = stream or self.begin(choice), delta or Delta()
        if stream.parser is None or self.calls is None:
            text = self._text(choice, delta, first)
        else:
            pieces = stream.parser.push(delta.content) + (stream.parser.finish() if end else [])
            text = self._text(choice, replace(delta, content=""), first)
            text["delta"] |= self.calls.delta(choice, pieces)
        body = (
            text
            | {"index": choice, "logprobs": self._choice_logprobs(delta, stream.offsets)}
            | self._finish_fields(end, stream.parser is not None and stream.parser.called)
        )
        body |= self._token_ids(choice, delta, first)
        return self._frame(self.chunk_type, [body | self._explanation(delta)]) | self._prompt_ids(choice, False, first)

    def last_chunk(self, usages: Sequence[Usage], prompt_tokens: int, include_usage: bool) -> Json | None:
        """The last event of a stream, with the counts and the metrics if the request wants them; None for neither."""
        counts = {"usage": usage_body(usages, prompt_tokens, self.choices_per_prompt)} if include_usage else {}
        wanted = counts | self._metrics(usages)
        return self._frame(self.chunk_type, []) | wanted if wanted else None

    def _metrics(self, usages: Sequence[Usage]) -> Json:
        return {} if self.metrics is None else {"metrics": self.metrics(usages)}

    def _frame(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": f"{self.prefix}-{self.request_id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "seed": self.seed,
            "choices": choices,
        }

    def _whole_choice(self, index: int, answer: CompletedChoice) -> Json:
        body: Json = {"index": index, "logprobs": self._choice_logprobs(answer.delta, self._offsets(index))}
        body |= self._whole_text(index, answer.delta)
        called = False
        if self.calls is not None:
            message = self.calls.message(index, answer.delta.content)
            body["message"] |= message
            called = "tool_calls" in message
        body |= self._token_ids(index, answer.delta, first=True)
        body |= self._finish_fields(answer.end, called) | self._explanation(answer.delta)
        return _with_keys(body, self.choice_keys)

    def _finish_fields(self, end: Finished | None, called: bool) -> Json:
        """The end of a choice; null before. called: it has tool calls."""
        if end is None:
            return {"finish_reason": None}
        reason = self.calls.finish_reason(end.reason) if self.calls and called else end.reason
        return {"finish_reason": reason, "stop_reason": end.stop_reason}

    def _token_ids(self, choice: int, delta: Delta, first: bool) -> Json:
        if self.prompts is None:
            return {}
        return {"token_ids": delta.tokens} | self._prompt_ids(choice, True, first)

    def _prompt_ids(self, choice: int, in_choice: bool, first: bool = True) -> Json:
        if self.prompts is None or not first or in_choice != self.prompts_in_choices:
            return {}
        return {"prompt_token_ids": self.prompts[choice]}

    def _explanation(self, delta: Delta) -> Json:
        return {"guidance": {"tokens": [self.tokens.explain(note) for note in delta.notes]}} if self.explain else {}

    def _choice_logprobs(self, delta: Delta, offsets: TextOffsets) -> Json | None:
        if self.logprobs is None or not self._listed_notes(delta):
            return None
        return self._logprobs(delta, self.logprobs, offsets)

    def _listed_notes(self, delta: Delta) -> Sequence[Note]:
        """The tokens of a choice's text, with echo including the prompt's."""
        return [*delta.prompt, *delta.notes] if self.echo else delta.notes

    @abstractmethod
    def _logprobs(self, delta: Delta, top: int, offsets: TextOffsets) -> Json:
        """Log-probabilities of a choice's tokens."""

    @abstractmethod
    def _text(self, choice: int, delta: Delta, first: bool) -> Json:
        """The text fields of a chunk's choice."""

    @abstractmethod
    def _whole_text(self, choice: int, delta: Delta) -> Json:
        """The text fields of a whole choice."""

    @abstractmethod
    def _prompt_logprobs(self, answers: Sequence[CompletedChoice]) -> Json:
        """Prompt log-probabilities beside the choices, if they belong there."""


class ChatFormat(BodyFormat):
    """Writes bodies of /v1/chat/completions."""

    prefix, object_type, chunk_type = "chatcmpl", "chat.completion", "chat.completion.chunk"
    prompts_in_choices = False
    answer_keys = (*_ANSWER_KEYS, "prompt_logprobs", "prompt_token_ids", "prompt_text")
    choice_keys = _CHOICE_KEYS

    def _logprobs(self, delta: Delta, top: int, offsets: TextOffsets) -> Json:
        return self.tokens.chat(delta.notes, top)

    def _prompt_logprobs(self, answers: Sequence[CompletedChoice]) -> Json:
        if self.prompt_logprobs is None:
            return {}
        return {"prompt_logprobs": self.tokens.prompt(answers[0].delta.prompt, self.prompt_logprobs)}

    def _text(self, choice: int, delta: Delta, first: bool) -> Json:
        message = {"role": "assistant"} if first else {}
        if delta.content or first:
            message["content"] = delta.content
        return {"delta": message | self._reasoning(delta)}

    def _whole_text(self, choice: int, delta: Delta) -> Json:
        message = {"role": "assistant", "content": delta.content} | self._reasoning(delta)
        return {"message": _with_keys(message, _MESSAGE_KEYS)}

    def _reasoning(self, delta: Delta) -> Json:
        """The thinking under both of its usual names; absent if there is none: clients send back what they read."""
        if not delta.reasoning or not self.include_reasoning:
            return {}
        return {"reasoning": delta.reasoning, "reasoning_content": delta.reasoning}


class CompletionFormat(BodyFormat):
    """Writes bodies of /v1/completions."""

    prefix, object_type, chunk_type = "cmpl", "text_completion", "text_completion"
    prompts_in_choices = True
    answer_keys = _ANSWER_KEYS
    choice_keys = (*_CHOICE_KEYS, "prompt_logprobs", "prompt_token_ids")

    def _logprobs(self, delta: Delta, top: int, offsets: TextOffsets) -> Json:
        return self.tokens.completion(self._listed_notes(delta), top, offsets)

    def _prompt_logprobs(self, answers: Sequence[CompletedChoice]) -> Json:
        return {}  # they are part of each choice

    def _text(self, choice: int, delta: Delta, first: bool) -> Json:
        prompt = self.echo[choice] if self.echo and first else ""
        return {"text": prompt + delta.content} | ({"reasoning": delta.reasoning} if delta.reasoning else {})

    def _whole_text(self, choice: int, delta: Delta) -> Json:
        text = self._text(choice, delta, first=True)
        if self.prompt_logprobs is None:
            return text
        return text | {"prompt_logprobs": self.tokens.prompt(delta.prompt, self.prompt_logprobs)}


def plain_usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """OpenAI's three counts."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def usage_body(usages: Sequence[Usage], prompt_tokens: int, choices_per_prompt: int = 1) -> Json:
    """Total counts of a request's sequences. prompt_tokens: each prompt counted once for all its choices.

    So are its cached tokens: those of its first choice, from which the others may take them.
    """
    completion = sum(usage.completion_tokens for usage in usages)
    guided = sum(usage.guided_tokens for usage in usages)
    mass = sum(usage.uncovered_mass * usage.guided_tokens for usage in usages)
    drafted = sum(usage.drafted_tokens for usage in usages)
    accepted = sum(usage.accepted_tokens for usage in usages)
    return plain_usage(prompt_tokens, completion) | {
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages[::choices_per_prompt])},
        "completion_tokens_details": {
            "reasoning_tokens": sum(usage.reasoning_tokens for usage in usages),
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        },
        "guidance": {
            "guided_tokens": guided,
            "changed_tokens": sum(usage.changed_tokens for usage in usages),
            "widened_rows": sum(usage.widened_rows for usage in usages),
            "uncovered_mass": mass / guided if guided else 0.0,
        },
        "speculation": {
            "drafted_tokens": drafted,
            "accepted_tokens": accepted,
            "acceptance": accepted / drafted if drafted else 0.0,
        },
    }


def _with_keys(body: Json, keys: Sequence[str]) -> Json:
    return body | dict.fromkeys(key for key in keys if key not in body)
