"""What a replica tells of itself: how busy it is, and what it has done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


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
