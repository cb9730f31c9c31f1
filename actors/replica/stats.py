"""What a replica tells of itself: how busy it is, and what it has done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from actors.metrics import Counter, Recorder
from actors.replica.scheduler import Chunk

Phase = Literal["prefill", "extend", "draft", "lookup"]


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """How busy a replica is, for placement and autoscaling."""

    sessions: int
    waiting: int  # extends that wait or run
    cache_total: int  # tokens
    cache_used: int
    forward_s: float  # a usual forward

    @property
    def cache_free(self) -> int:
        """Tokens that still fit."""
        return self.cache_total - self.cache_used


@dataclass(slots=True)
class ReplicaStats:
    """Totals since the start."""

    forwards: int = 0
    items: int = 0  # parts of extends that went through a forward
    tokens: int = 0  # that went through a forward
    forked_tokens: int = 0  # whose cache was copied from another session's instead
    lookups: int = 0  # rows looked up or widened
    lookups_waited: int = 0  # of these, rows that were still being made
    failures: int = 0  # forwards that raised
    forward_s: float = 0.0
    bytes_received: int = 0
    bytes_sent: int = 0
    refused_connections: Mapping[str, int] = field(default_factory=dict)  # by the stable code of what ended them

    def count(self, chunks: Sequence[Chunk], took: float) -> int:
        """A forward over these is over; the tokens that went through it."""
        packed = sum(chunk.tokens for chunk in chunks)
        self.forwards += 1
        self.items += len(chunks)
        self.tokens += packed
        self.forked_tokens += sum(chunk.forked for chunk in chunks)
        self.forward_s += took
        return packed


class ReplicaMeter:
    """What a replica of a role measures."""

    def __init__(self, role: str) -> None:
        self._role, self._recorder = role, Recorder()
        self._steps: dict[Phase, tuple[Counter, Counter]] = {}  # how many, and their seconds
        self._sessions: dict[Phase, Counter] = {}
        self._cache = self._recorder.gauge("thinklogit_cache_used_ratio", role)
        self._waiting = self._recorder.gauge("thinklogit_extends_waiting", role)
        self._tokens = self._recorder.counter("thinklogit_forward_tokens", role)
        self._failed = self._recorder.counter("thinklogit_failed_forwards", role)

    def forward(self, chunks: Sequence[Chunk], took: float) -> None:
        """A forward over these parts took so many seconds."""
        phase = phase_of(chunks)
        self._step(phase, took)
        if phase not in self._sessions:
            self._sessions[phase] = self._recorder.counter("thinklogit_batched_sessions", self._role, phase)
        self._sessions[phase].add(len(chunks))

    def looked_up(self, took: float) -> None:
        """A frame of lookups was answered."""
        self._step("lookup", took)

    def report(self, load: ReplicaLoad, stats: ReplicaStats) -> Recorder:
        """All that was measured, as of now."""
        self._cache.value = load.cache_used / load.cache_total
        self._waiting.value = load.waiting
        self._tokens.value, self._failed.value = stats.tokens, stats.failures
        return self._recorder

    def _step(self, phase: Phase, took: float) -> None:
        if phase not in self._steps:
            self._steps[phase] = (
                self._recorder.counter("thinklogit_steps", self._role, phase),
                self._recorder.counter("thinklogit_step_seconds", self._role, phase),
            )
        steps, seconds = self._steps[phase]
        steps.add()
        seconds.add(took)


def phase_of(chunks: Sequence[Chunk]) -> Phase:
    """What a forward is for: a prompt's part takes most of its time, drafts are one token each."""
    if any(not chunk.scheduled.is_decode for chunk in chunks):
        return "prefill"
    drafts = bool(chunks) and all(chunk.scheduled.item.draft is not None for chunk in chunks)
    return "draft" if drafts else "extend"
