"""The messages between router and coordinator, as plain data that any transport can carry."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from actors.api.guidance import Guidance
from actors.api.message import Message
from actors.api.sampling_params import Sampling, Thinking

Role = Literal["target", "guider", "guider_base"]
ROLES: tuple[Role, ...] = ("target", "guider", "guider_base")
FinishReason = Literal["stop", "length", "abort", "error"]
EXPLAINED = 5  # candidates of each model in a token's explanation


@dataclass(frozen=True, slots=True)
class Generate(Message):
    """One sequence to decode.

    primary: the role whose vocabulary the answer is in: "target", or a small role decoded alone.
    prompts: token ids by role, each in its own vocabulary. A role that is absent cannot guide.
    seed: of this sequence's choices alone (derived from the request's seed and the choice's index).
    explain: send a note with each token that lists the candidates of each model.
    logprobs: send each token's log-probability and those of so many likeliest candidates; None for none.
    prompt_logprobs: the same for the tokens of the prompt, all at the request's alpha.
    only_prompt: decode nothing.
    grammar: of the answer behind its thinking, in llguidance's form; "" for none. It must have been checked before.
    shown_specials: special ids that the text shows although it skips the others, such as the marks of tool calls.
    drafts: maximal number of drafts, 0 for none; None for the service's configuration.
    drafter: the source of drafts. "auto": the guider if it guides, else the session's own text; "guider": the guider.
    interval_s: minimal seconds between two deltas; each message costs CPU time.
    client: name by which clients are treated fairly; "" for all without a name.
    priority: lower ones of the same client leave the admission queue first.
    trace_id: of the client's trace, for logs; "" without one.
    arrived: time of the request in nanoseconds since the epoch. If the cache is short, older sequences go first: one
    that was moved to another coordinator counts from here, others from their admission.
    resume: the state at which another coordinator left the sequence. Text that was sent before is not sent again.
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
    grammar: str = ""
    shown_specials: tuple[int, ...] = ()
    drafts: int | None = None
    drafter: Literal["auto", "guider"] = "auto"
    interval_s: float = 0.0
    client: str = ""
    priority: int = 0
    trace_id: str = ""
    arrived: int = field(default_factory=time.time_ns)
    resume: Resume | None = None

    @property
    def name_in_logs(self) -> str:
        """The request's id, and that of the client's trace if there is one."""
        return f"{self.request_id} (trace {self.trace_id})" if self.trace_id else self.request_id

    @property
    def resumed(self) -> bool:
        """True if another coordinator began the sequence, so that the client has a part of the answer."""
        return self.resume is not None

    @property
    def top(self) -> int | None:
        """Number of candidates in each token's note; None if no notes are wanted."""
        wanted = [count for count in (self.logprobs, EXPLAINED if self.explain else None) if count is not None]
        return max(wanted, default=None)


@dataclass(frozen=True, slots=True)
class Tally(Message):
    """Counts of a sequence that do not follow from its choices. uncovered: mass (0 to 1), summed over guided rows.

    queued_s: seconds in admission queues. cached: tokens of the prompt that were in the cache of the primary's replica.
    """

    guided: int = 0
    changed: int = 0
    widened: int = 0
    uncovered: float = 0.0
    drafted: int = 0
    accepted: int = 0
    queued_s: float = field(default=0.0, compare=False)
    cached: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Resume(Message):
    """The state of a sequence. With it and the request, another coordinator continues with the same tokens.

    choices: the chosen tokens. Forced ones follow from these and are not among them. scored: the number of tokens of
    the prompt whose log-probabilities were sent.
    """

    choices: list[int] = field(default_factory=list)
    tally: Tally = Tally()
    scored: int = 0


Candidates = tuple[tuple[int, float], ...]  # ids of the primary with their log-probabilities, likeliest first


@dataclass(frozen=True, slots=True)
class Scores(Message):
    """Log-probabilities (nats) of one chosen token and of the alternatives, before any filter or penalty.

    logprob: of the token in the combined distribution, whose likeliest candidates are `guided`. shift: the difference
    to the token's log-probability under the target alone. target, guider: their own likeliest candidates if the
    request wants explanations.
    """

    logprob: float
    shift: float
    guided: Candidates
    target: Candidates = ()
    guider: Candidates = ()


@dataclass(frozen=True, slots=True)
class TokenNote(Message):
    """One token of the answer, for clients that want explanations or log-probabilities.

    alpha: the strength of guidance at this token. changed: True if the target alone would have chosen another token.
    drafted: True if it was a draft. scores: None for a forced token.
    """

    id: int
    text: str
    alpha: float
    changed: bool
    drafted: bool = False
    scores: Scores | None = None


@dataclass(frozen=True, slots=True)
class PromptNote(Message):
    """One token of the prompt with its log-probability (nats) in the combined distribution; None for the first.

    rank: 1 for the likeliest token of the vocabulary.
    """

    id: int
    logprob: float | None
    rank: int = 0
    guided: Candidates = ()


@dataclass(frozen=True, slots=True)
class Delta(Message):
    """The next part of an answer. An empty one is a sign of life.

    notes: filled if the request wants explanations or log-probabilities. prompt: filled if it wants those of the
    prompt. choices, tally: for `Resume`, the choices since the last delta and the counts so far.
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
class Usage(Message):
    """Counts of one sequence. uncovered_mass: mean over guided rows. drafted_tokens: drafts that were verified.

    queued_s: seconds in admission queues. cached_tokens: tokens of the prompt that were in the cache of the primary's
    replica, because another session has the same beginning.
    """

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    guided_tokens: int
    changed_tokens: int
    widened_rows: int
    uncovered_mass: float
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    queued_s: float = field(default=0.0, compare=False)
    cached_tokens: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Finished(Message):
    """The end of an answer.

    stop_reason: the stop text or id that ended it, or "repeat". error: a sentence for the client if reason is "error".
    """

    reason: FinishReason
    usage: Usage
    stop_reason: str | int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Rejected(Message):
    """The only event of a request that was refused. retry_after_s: seconds to wait; None if a retry cannot help."""

    code: Literal["overloaded", "unavailable", "invalid"]
    message: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Moved(Message):
    """The coordinator gives the sequence up: another one must continue it, from the state so far as `resume`."""


Event = Delta | Finished | Rejected  # an event for the client of an answer
CoordinatorEvent = Event | Moved  # an event for the router
