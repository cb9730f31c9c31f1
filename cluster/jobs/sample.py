"""Data types for one answer of an evaluation: its key, its content and its timing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

Mode: TypeAlias = Literal["target", "guider", "guider_base", "guided"]
MODES: tuple[Mode, ...] = get_args(Mode)
ALONE = "-"  # the setting of modes without guidance


class Key(NamedTuple):
    """The identity of a sample, unique in a run. Keys sort as tuples."""

    task: str  # the task's name
    problem: str  # its id within the task
    mode: Mode
    setting: str  # name of alpha, warm-up and schedule together; ALONE without guidance
    seed: int  # of the run
    number: int  # 0 .. samples - 1 of the problem


@dataclass(frozen=True, slots=True)
class Sample:
    """An answer, which depends only on key, configuration and models: interruptions do not change it.

    finish: "stop" or "length" (truncated). extracted: the answer that the grader read in the text, None if it found
    none.
    """

    key: Key
    text: str  # as generated, thinking included
    extracted: str | None
    right: bool
    finish: str
    prompt_tokens: int
    tokens: int
    reasoning_tokens: int
    guided_tokens: int
    changed_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Duration and drafts of a sample, which differ from run to run."""

    key: Key
    seconds: float  # from the request to the last token
    drafted_tokens: int
    accepted_tokens: int
