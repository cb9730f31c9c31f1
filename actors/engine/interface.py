"""The one verb of a model, `Extend`, its answers, and what an engine is. No torch here: any process may name them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

KEEP_ALL = 1 << 30  # as `keep`
BLOCK = 16  # tokens: caches are shared in whole blocks from the first token on


class Extend(NamedTuple):
    """Append `tokens` at `position` of a session and hold the logits of the last `rows` of them.

    A position smaller than what is held rewinds to there first; a larger one is a `KVMiss`.
    """

    session: int  # key of the owner's cache
    position: int  # tokens before the first of `tokens`
    prefix: int  # 64-bit running hash of those tokens, begun from the engine's hash_seed
    tokens: Sequence[int]  # at least one
    rows: int  # 0 .. len(tokens)
    age: int  # admission age: a smaller one is older and may evict a larger one
    keep: int = 0  # so many held rows before `position` stay, and the new ones join them

    @property
    def end(self) -> int:
        """The session's length afterwards, in tokens."""
        return self.position + len(self.tokens)


class Held(NamedTuple):
    """Success: the session holds `length` tokens, and `rows` new rows until its next extend that keeps none."""

    session: int
    length: int
    rows: int


class KVMiss(NamedTuple):
    """The cache ends before `position` or was built from other tokens: send again from position `held`."""

    session: int
    held: int


class Full(NamedTuple):
    """No room for this session now. Nothing of it was computed: try again later."""

    session: int


Outcome: TypeAlias = Held | KVMiss | Full


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Size and use of a cache, in tokens."""

    tokens_total: int
    tokens_used: int  # in the allocator's units, what sessions need rounded up
    sessions: int  # sessions that hold at least one token


@dataclass(frozen=True, slots=True)
class TopKSlices:
    """The k largest logits of R rows, in the host's memory; of equal logits at the k-th place the lowest ids."""

    ids: NDArray[np.int32]  # [R, k], ascending
    logits: NDArray[np.float32]  # [R, k]
    logsumexp: NDArray[np.float32]  # [R], over the whole row


class HeldRows(Protocol):
    """The rows of a session's last extend and of those that it kept: a snapshot that any thread may read."""

    @property
    def size(self) -> int:
        """Rows held; the last extend's own are the last."""

    def index(self, position: int, prefix: int) -> int | None:
        """Which row is at `position`, built from tokens with this running hash, its own token included."""

    def slices(self, k: int, rows: Sequence[int] | None = None) -> TopKSlices: ...
    def whole(self, rows: Sequence[int] | None = None) -> NDArray[np.float32]: ...


class Engine(Protocol):
    """A model that extends sessions: `actors.engine.step_engine.StepEngine`, or one that computes nothing.

    `rows`, `values` and `check_extend` may be called from any thread, everything else from one at a time.
    """

    width: int  # logits in a row
    hash_seed: int
    batch_invariant: bool

    def extend(self, batch: Sequence[Extend]) -> list[Outcome]: ...
    def check_extend(self, extend: Extend) -> None:
        """Raise for an extend that can never succeed."""

    def shared(self, blocks: Sequence[int]) -> int:
        """How many of a sequence's first blocks, named by the running hash after each, some session holds."""

    def fork(self, session: int, tokens: Sequence[int], blocks: Sequence[int], age: int) -> bool:
        """Let a session hold `tokens`, whole blocks that some session holds, without a forward; False if it cannot.

        It then holds nothing, or what it held.
        """

    def rows(self, session: int) -> HeldRows | None: ...
    def values(self, rows: Sequence[tuple[Any, int]], counts: Sequence[int], ids: NDArray[Any]) -> NDArray[np.float32]:
        """The logits [N] of rows (what `rows` gave, and which of them) at ids [N], `counts` of each row in turn."""

    def reduce(self, sessions: Sequence[int], k: int) -> TopKSlices:
        """The slices of the rows that the last extends of `sessions` gave."""

    def whole(self, sessions: Sequence[int]) -> NDArray[np.float32]: ...
    def close(self, session: int) -> None: ...
    def cache_stats(self) -> CacheStats: ...
    def check(self) -> None:
        """Prove that the cache's accounts are exact; AssertionError if not."""

    def check_health(self) -> None:
        """Raise if it cannot go on."""
