"""Parameters of a request for sampling and thinking, validated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from actors.api.message import Message


@dataclass(frozen=True, slots=True)
class Sampling(Message):
    """Sampling parameters, with the meanings and names that vLLM gives them.

    temperature: 0 is greedy. top_k: 0 keeps all. top_p, min_p: nucleus and relative floor, after the temperature.
    repetition_penalty acts on prompt and output tokens, presence_penalty and frequency_penalty on output tokens.
    logit_bias: pairs (token id, number added to its logit). min_tokens: the answer cannot end before so many tokens.
    stop: texts, stop_token_ids: ids, each of which ends the answer. ignore_eos: do not end at the model's end tokens.
    allowed_token_ids: if there are any, no other token is chosen. bad_words: sequences of ids that are never generated.
    skip_special_tokens: leave the vocabulary's special tokens out of the text.
    stop_on_repeat: end after the same token so many times in a row (published runs: 10); 0 never.
    Raises ValueError for values outside their range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    stop_on_repeat: int = 0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    @property
    def filters(self) -> bool:
        """True if top_k, top_p or min_p may leave tokens out."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0, 100)
        _within("top_k", self.top_k, 0, math.inf)
        _within("top_p", self.top_p, 0, 1, above=True)
        _within("min_p", self.min_p, 0, 1)
        _within("repetition_penalty", self.repetition_penalty, 0, 100, above=True)
        _within("presence_penalty", self.presence_penalty, -2, 2)
        _within("frequency_penalty", self.frequency_penalty, -2, 2)
        _within("min_tokens", self.min_tokens, 0, math.inf)
        if self.stop_on_repeat != 0:
            _within("stop_on_repeat", self.stop_on_repeat, 2, math.inf)
        if self.max_tokens is not None:
            _within("max_tokens", self.max_tokens, 1, math.inf)
            if self.min_tokens > self.max_tokens:
                raise ValueError(f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})")
        for _, bias in self.logit_bias:
            _within("logit_bias", bias, -100, 100)
        if any(not text for text in self.stop):
            raise ValueError("a stop text is empty")
        if any(not ids for ids in self.bad_words):
            raise ValueError("one of bad_words is empty")


def _within(name: str, value: float, low: float, high: float, above: bool = False) -> None:
    inside = (low < value if above else low <= value) and value <= high and not math.isnan(value)
    if not inside:
        top = "" if high == math.inf else f" and at most {high}"
        raise ValueError(f"{name} must be {'above' if above else 'at least'} {low}{top}, not {value}")


@dataclass(frozen=True, slots=True)
class Thinking(Message):
    """Markers and limits of an answer's thinking.

    start: text appended to every role's prompt, unless the chat template has opened or closed the thinking itself; with
    "" all text is content. end: text that ends the thinking.
    max_tokens: after so many thinking tokens the end is forced: `closing`, a part of the thinking, and then `end`.
    min_tokens: before so many thinking tokens an end token is replaced by `wait` (budget forcing, arXiv 2501.19393),
    and so is `end` if it is one token of the primary. If it is several, the token that would complete it cannot be
    chosen.
    """

    start: str = ""
    end: str = "</think>"
    max_tokens: int | None = None
    min_tokens: int = 0
    wait: str = "Wait"
    closing: str = ""
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.start and not self.end:
            raise ValueError("thinking.start needs thinking.end, the text that closes the thinking")
        if self.min_tokens < 0 or (self.max_tokens is not None and self.max_tokens < max(1, self.min_tokens)):
            raise ValueError("thinking.max_tokens must be at least 1 and not below thinking.min_tokens, both 0 or more")
        if self.min_tokens and not self.wait:
            raise ValueError("thinking.min_tokens needs thinking.wait, the text that takes the place of an early end")
        if self.end and (self.closing + self.end).index(self.end) < len(self.closing):
            raise ValueError("thinking.closing must not hold thinking.end, which is put behind it")
