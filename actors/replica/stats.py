"""The load, the totals and the metrics of a replica."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from actors.metrics import Counter, Recorder
from actors.replica.lookups import LookupService
from actors.replica.scheduler import Chunk
from actors.wire.server import Peer, Server

Phase = Literal["prefill", "extend", "draft", "lookup"]


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """The load of a replica, for placement and autoscaling."""

    sessions: int
    waiting: int  # extends that wait or run
    cache_total: int  # tokens
    cache_used: int
    forward_s: float  # running mean of a forward's seconds

    @property
    def cache_free(self) -> int:
        """Tokens that still fit."""
        return self.cache_total - self.cache_used


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """Totals since the start."""

    forwards: int
    forward_s: float
    items: int  # chunks of extends that went through a forward
    tokens: int  # that went through a forward
    forked_tokens: int  # whose cache was copied from another session's instead
    failures: int  # forwards that raised
    lookups: int  # rows looked up or widened
    lookups_waited: int  # of these, rows that were still being made
    bytes_received: int
    bytes_sent: int
    refused_connections: Mapping[str, int]  # by the stable code of what ended them


class _PhaseCounters(NamedTuple):
    """The counters of one phase. sessions: in forwards, summed over these."""

    steps: Counter
    seconds: Counter
    sessions: Counter


class ReplicaMeter:
    """The metrics of one replica, and the totals that are no metrics."""

    def __init__(self, role: str) -> None:
        self._role, self._recorder = role, Recorder()
        self._phases: dict[Phase, _PhaseCounters] = {}
        self._cache = self._recorder.gauge("thinklogit_cache_used_ratio", role)
        self._cache_tokens = self._recorder.gauge("thinklogit_cache_tokens", role)
        self._waiting = self._recorder.gauge("thinklogit_extends_waiting", role)
        self._tokens = self._recorder.counter("thinklogit_forward_tokens", role)
        self._failed = self._recorder.counter("thinklogit_failed_forwards", role)
        self._forked_tokens = self._bytes_received = self._bytes_sent = 0

    def forward(self, chunks: Sequence[Chunk], took: float) -> int:
        """Count a forward over these chunks, which took so many seconds. Returns the tokens that went through it."""
        tokens = sum(chunk.tokens for chunk in chunks)
        self._step(phase_of(chunks), took, len(chunks))
        self._tokens.add(tokens)
        self._forked_tokens += sum(chunk.forked for chunk in chunks)
        return tokens

    def failed(self) -> None:
        """Count a forward that raised."""
        self._failed.add()

    def looked_up(self, took: float) -> None:
        """Count a frame of lookups that was answered within so many seconds."""
        self._step("lookup", took)

    def disconnected(self, peer: Peer) -> None:
        """Keep the bytes of a connection that is over."""
        self._bytes_received += peer.bytes_received
        self._bytes_sent += peer.bytes_sent

    def report(self, load: ReplicaLoad) -> Recorder:
        """All metrics, with the gauges set from `load`."""
        self._cache.value = load.cache_used / load.cache_total
        self._cache_tokens.value = load.cache_total
        self._waiting.value = load.waiting
        return self._recorder

    def stats(self, lookups: LookupService, server: Server) -> ReplicaStats:
        """The totals as of now."""
        forwards = [counters for phase, counters in self._phases.items() if phase != "lookup"]
        return ReplicaStats(
            forwards=int(sum(counters.steps.value for counters in forwards)),
            forward_s=sum(counters.seconds.value for counters in forwards),
            items=int(sum(counters.sessions.value for counters in forwards)),
            tokens=int(self._tokens.value),
            forked_tokens=self._forked_tokens,
            failures=int(self._failed.value),
            lookups=lookups.requested,
            lookups_waited=lookups.waited,
            bytes_received=self._bytes_received + sum(peer.bytes_received for peer in server.peers),
            bytes_sent=self._bytes_sent + sum(peer.bytes_sent for peer in server.peers),
            refused_connections=dict(server.refused),
        )

    def _step(self, phase: Phase, took: float, sessions: int = 0) -> None:
        if phase not in self._phases:
            names = ("thinklogit_steps", "thinklogit_step_seconds", "thinklogit_batched_sessions")
            self._phases[phase] = _PhaseCounters(*(self._recorder.counter(name, self._role, phase) for name in names))
        counters = self._phases[phase]
        counters.steps.add()
        counters.seconds.add(took)
        counters.sessions.add(sessions)


def phase_of(chunks: Sequence[Chunk]) -> Phase:
    """A forward's phase: prefill if it has a chunk of a prompt, draft if all its extends draft, else extend."""
    if any(not chunk.scheduled.is_decode for chunk in chunks):
        return "prefill"
    drafts = bool(chunks) and all(chunk.scheduled.item.draft is not None for chunk in chunks)
    return "draft" if drafts else "extend"
