"""The one verb of a model, `Extend`, and its answers. No torch here: any process may name them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Extend:
    """Append `tokens` at `position` of a session and hold the logits of the last `rows` of them.

    A position smaller than what is held rewinds to there first; a larger one is a `KVMiss`.
    """

    session: int  # key of the owner's cache
    position: int  # tokens before the first of `tokens`
    prefix: int  # 64-bit running hash of those tokens, begun from the engine's hash_seed
    tokens: Sequence[int]  # at least one
    rows: int  # 0 .. len(tokens)
    age: int  # admission age: a smaller one is older and may evict a larger one

    @property
    def end(self) -> int:
        """The session's length afterwards, in tokens."""
        return self.position + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Held:
    """Success: the session holds `length` tokens, and `rows` rows until its next extend."""

    session: int
    length: int
    rows: int


@dataclass(frozen=True, slots=True)
class KVMiss:
    """The cache ends before `position` or was built from other tokens: send again from position `held`."""

    session: int
    held: int


@dataclass(frozen=True, slots=True)
class Full:
    """No room for this session now. Nothing of it was computed: try again later."""

    session: int


Outcome: TypeAlias = Held | KVMiss | Full


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Size and use of a cache, in tokens."""

    tokens_total: int
    tokens_used: int  # in the allocator's units, what sessions need rounded up
    sessions: int  # sessions that hold at least one token
