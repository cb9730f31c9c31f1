"""The bodies of answers: whole ones and the chunks of streams, for chats and for completions."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from actors.requests import Delta, Finished, TokenNote, Usage

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """One whole choice."""

    delta: Delta
    end: Finished


@dataclass(frozen=True)
class Shape(ABC):
    """What the bodies of one request have in common; its two kinds say how a choice is written.

    prompts: the prompt's ids of each choice where ids are asked for; prompts_in_choices: where they stand.
    """

    request_id: str
    model: str
    seed: int
    explain: bool
    prompts: Sequence[list[int]] | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    prefix: ClassVar[str]
    whole: ClassVar[str]
    part: ClassVar[str]
    prompts_in_choices: ClassVar[bool]

    def body(self, answers: Sequence[Answer], prompt_tokens: int) -> Json:
        """The body of an answer that is not streamed."""
        choices = [self._whole_choice(index, answer) for index, answer in enumerate(answers)]
        usage = usage_body([answer.end.usage for answer in answers], prompt_tokens)
        return self._frame(self.whole, choices) | {"usage": usage} | self._prompt_ids(0, in_choice=False)

    def chunk(self, choice: int, delta: Delta | None, end: Finished | None, first: bool) -> Json:
        """One event of a stream: more of a choice, its end, or both. first: nothing of the choice was sent before."""
        body = self._text(delta or Delta(), first) | {"index": choice, "logprobs": None} | _ending(end)
        body |= self._ids(choice, delta or Delta(), first)
        return self._frame(self.part, [body | self._explained(delta)]) | self._prompt_ids(choice, False, first)

    def usage_chunk(self, usages: Sequence[Usage], prompt_tokens: int) -> Json:
        """The last event of a stream whose request asked for its usage."""
        return self._frame(self.part, []) | {"usage": usage_body(usages, prompt_tokens)}

    def _frame(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": f"{self.prefix}-{self.request_id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "seed": self.seed,
            "choices": choices,
        }

    def _whole_choice(self, index: int, answer: Answer) -> Json:
        body = {"index": index, "logprobs": None} | self._whole_text(answer.delta)
        body |= self._ids(index, answer.delta, first=True)
        return body | _ending(answer.end) | self._explained(answer.delta)

    def _ids(self, choice: int, delta: Delta, first: bool) -> Json:
        if self.prompts is None:
            return {}
        return {"token_ids": delta.tokens} | self._prompt_ids(choice, True, first)

    def _prompt_ids(self, choice: int, in_choice: bool, first: bool = True) -> Json:
        if self.prompts is None or not first or in_choice != self.prompts_in_choices:
            return {}
        return {"prompt_token_ids": self.prompts[choice]}

    def _explained(self, delta: Delta | None) -> Json:
        notes = delta.notes if delta is not None else []
        return {"guidance": {"tokens": [_note(note) for note in notes]}} if self.explain else {}

    @abstractmethod
    def _text(self, delta: Delta, first: bool) -> Json:
        """The text of a chunk's choice."""

    @abstractmethod
    def _whole_text(self, delta: Delta) -> Json:
        """The text of a whole choice."""


class ChatShape(Shape):
    """Bodies of /v1/chat/completions."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"
    prompts_in_choices = False

    def _text(self, delta: Delta, first: bool) -> Json:
        message = {"role": "assistant"} if first else {}
        if delta.reasoning:
            message |= {"reasoning": delta.reasoning, "reasoning_content": delta.reasoning}
        if delta.content or first:
            message["content"] = delta.content
        return {"delta": message}

    def _whole_text(self, delta: Delta) -> Json:
        reasoning = delta.reasoning or None
        message = {"role": "assistant", "content": delta.content}
        return {"message": message | {"reasoning": reasoning, "reasoning_content": reasoning}}


class CompletionShape(Shape):
    """Bodies of /v1/completions."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"
    prompts_in_choices = True

    def _text(self, delta: Delta, first: bool) -> Json:
        return {"text": delta.content} | ({"reasoning": delta.reasoning} if delta.reasoning else {})

    def _whole_text(self, delta: Delta) -> Json:
        return self._text(delta, first=True)


def plain_usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """The counts of one choice so far."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def usage_body(usages: Sequence[Usage], prompt_tokens: int) -> Json:
    """The counts of a request's sequences together; a prompt counts once, however many choices it has."""
    completion = sum(usage.completion_tokens for usage in usages)
    guided = sum(usage.guided_tokens for usage in usages)
    mass = sum(usage.uncovered_mass * usage.guided_tokens for usage in usages)
    drafted = sum(usage.drafted_tokens for usage in usages)
    accepted = sum(usage.accepted_tokens for usage in usages)
    return plain_usage(prompt_tokens, completion) | {
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


def _ending(end: Finished | None) -> Json:
    return {"finish_reason": end and end.reason} | ({"stop_reason": end.stop_reason} if end else {})


def _note(note: TokenNote) -> Json:
    return {"id": note.id, "text": note.text, "alpha": note.alpha, "changed": note.changed}
