"""One answer of an evaluation, as every module of a job names it: its key, what was said, and what it took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

Mode: TypeAlias = Literal["target", "guider", "guider_base", "guided"]
MODES: tuple[Mode, ...] = get_args(Mode)
ALONE = "-"  # the setting of modes that nothing guides


class Key(NamedTuple):
    """What makes a sample one of a kind; a run has each key once. Keys sort as tuples."""

    task: str  # the task's name
    problem: str  # its id within the task
    mode: Mode
    setting: str  # the name of alpha, warm-up and schedule together; ALONE where nothing guides
    seed: int  # of the run
    number: int  # 0 .. samples - 1 of the problem


@dataclass(frozen=True, slots=True)
class Sample:
    """What follows from key, configuration and models alone: the same however often a run was interrupted.

    finish: "stop" or "length" (truncated). extracted: the answer that the grader read, None if it found none.
    """

    key: Key
    text: str  # thinking included, as it was generated
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
    """What a sample took, which differs from run to run."""

    key: Key
    seconds: float  # from request to last token
    drafted_tokens: int
    accepted_tokens: int
