"""What the router asks of a coordinator and what comes back, as plain data that any transport can carry."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from actors.api.guidance import Guidance
from actors.api.sampling_params import Sampling, Thinking

Role = Literal["target", "guider", "guider_base"]
ROLES: tuple[Role, ...] = ("target", "guider", "guider_base")
FinishReason = Literal["stop", "length", "abort", "error"]
EXPLAINED = 5  # candidates of each model in an explanation


@dataclass(frozen=True, slots=True)
class Generate:
    """One sequence to decode.

    primary: the role whose vocabulary the answer is in: "target", or a small role decoded alone.
    prompts: token ids per role, each in its own vocabulary; a role that is absent cannot guide.
    seed: of this sequence's choices alone (derived from the request's seed and the choice's index).
    drafts: tokens drafted ahead at most, 0 for none; None: as the service is configured.
    interval_s: seconds between two deltas at least, where the reader is in no hurry; each message costs CPU time.
    client: who asks, for fairness between clients; "" for all who do not say.
    drafter: who drafts. "auto": the guider where it guides, else the session's own text; "guider": always the guider.
    arrived: when the service was asked, in nanoseconds since the epoch. Where room is short, older ones go first; one
    that was moved counts from here, others from when they were admitted.
    explain: each token comes with a note of what each model said of it. logprobs: it comes with its log-probability
    and those of so many likeliest candidates; None: without. prompt_logprobs: so do the tokens of the prompt, at the
    request's alpha throughout. only_prompt: nothing is decoded.
    resume: how far another coordinator has brought the sequence; what it had said is not said again.
    """

    request_id: str
    primary: Role
    prompts: dict[Role, list[int]]
    sampling: Sampling
    guidance: Guidance
    thinking: Thinking
    seed: int
    explain: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    only_prompt: bool = False
    drafts: int | None = None
    drafter: Literal["auto", "guider"] = "auto"
    interval_s: float = 0.0
    client: str = ""
    arrived: int = field(default_factory=time.time_ns)
    resume: Resume | None = None

    @property
    def resumed(self) -> bool:
        """Whether another coordinator began it: its client has part of the answer already."""
        return self.resume is not None

    @property
    def top(self) -> int | None:
        """How many candidates each token's note lists at least; None: its log-probability is not wanted."""
        wanted = [count for count in (self.logprobs, EXPLAINED if self.explain else None) if count is not None]
        return max(wanted, default=None)


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts of a sequence that its choices alone do not tell. uncovered: the sum over guided rows."""

    guided: int = 0
    changed: int = 0
    widened: int = 0
    uncovered: float = 0.0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class Resume:
    """All that a sequence has come to: with its request, whoever has this goes on with the very same tokens.

    choices: the tokens that were chosen. Forced ones are not among them, they follow from these. scored: tokens of the
    prompt whose log-probabilities were told.
    """

    choices: list[int] = field(default_factory=list)
    tally: Tally = Tally()
    scored: int = 0


Candidates = tuple[tuple[int, float], ...]  # ids of the primary with their log-probabilities, likeliest first


@dataclass(frozen=True, slots=True)
class Scores:
    """What was said of one token where it was chosen: log-probabilities in nats, before any filter or penalty.

    logprob: of the token in the combined distribution, whose likeliest candidates are `guided`. shift: by how much
    guidance raised it above the target's. target, guider: their own likeliest, where an explanation was asked for.
    """

    logprob: float
    shift: float
    guided: Candidates
    target: Candidates = ()
    guider: Candidates = ()


@dataclass(frozen=True, slots=True)
class TokenNote:
    """What is told of one token: its text, the alpha in force, whether the target alone had chosen another, and whether
    it had been drafted.

    scores: None for a token that was forced.
    """

    id: int
    text: str
    alpha: float
    changed: bool
    drafted: bool = False
    scores: Scores | None = None


@dataclass(frozen=True, slots=True)
class PromptNote:
    """The log-probability (nats) of one token of the prompt in the combined distribution; of the first there is none.

    rank: 1 for the likeliest of the vocabulary.
    """

    id: int
    logprob: float | None
    rank: int = 0
    guided: Candidates = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """More of an answer. One without anything says that the coordinator lives.

    notes: filled when the request asked for explanations or log-probabilities; prompt: when it asked for those of the
    prompt. choices, tally: for `Resume`; the choices since the last delta, and the counts as of now.
    """

    reasoning: str = ""
    content: str = ""
    tokens: list[int] = field(default_factory=list)
    notes: list[TokenNote] = field(default_factory=list)
    choices: list[int] = field(default_factory=list)
    tally: Tally | None = None
    prompt: list[PromptNote] = field(default_factory=list)

    def __add__(self, later: Delta) -> Delta:
        return Delta(
            self.reasoning + later.reasoning,
            self.content + later.content,
            self.tokens + later.tokens,
            self.notes + later.notes,
            self.choices + later.choices,
            later.tally or self.tally,
            self.prompt + later.prompt,
        )


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of one sequence. Masses are means over guided rows. drafted_tokens: those that were checked."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    guided_tokens: int
    changed_tokens: int
    widened_rows: int
    uncovered_mass: float
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of an answer.

    stop_reason: the stop text or id that ended it, or "repeat". error: a sentence for the client when the reason is
    "error".
    """

    reason: FinishReason
    usage: Usage
    stop_reason: str | int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """The only event of a request that was not taken on. retry_after_s: when trying again makes sense, else None."""

    code: Literal["overloaded", "unavailable", "invalid"]
    message: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Moved:
    """The coordinator hands the sequence over: ask another one, with all that came before as `resume`."""


Event = Delta | Finished | Rejected  # what the reader of an answer hears
CoordinatorEvent = Event | Moved  # what a coordinator says
