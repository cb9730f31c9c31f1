"""The interface of an engine: `Extend`, its outcomes, and the `Engine` protocol. It imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

KEEP_ALL = 1 << 30  # as `keep`
BLOCK = 16  # tokens: caches are shared in whole blocks from the first token on


class Extend(NamedTuple):
    """Append `tokens` at `position` of a session and hold the logits rows of the last `rows` of them.

    A position below the number of cached tokens rewinds the session first; one above it is a `KVMiss`. Example: a
    session holds 10 tokens; `position=8, tokens=(a, b, c), rows=2` drops tokens 8 and 9, caches a, b, c as 8, 9, 10
    and holds the rows of b and c.
    """

    session: int  # key of its cache
    position: int  # number of tokens before the first of `tokens`
    prefix: int  # 64-bit running hash of those tokens, started from the engine's hash_seed
    tokens: Sequence[int]  # at least one
    rows: int  # 0 .. len(tokens)
    age: int  # admission age: a smaller one is older and may evict a larger one
    keep: int = 0  # number of held rows directly before `position` that stay, with the new ones behind them

    @property
    def end(self) -> int:
        """The session's length afterwards, in tokens."""
        return self.position + len(self.tokens)


class Held(NamedTuple):
    """Success: the session holds `length` tokens, and `rows` new rows until its next extend."""

    session: int
    length: int
    rows: int


class KVMiss(NamedTuple):
    """The cache ends before `position` or holds other tokens: send the tokens from position `held` on."""

    session: int
    held: int


class Full(NamedTuple):
    """The cache has no room for this session now. No token was computed: try again later."""

    session: int


Outcome: TypeAlias = Held | KVMiss | Full


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Size and use of a cache, in tokens."""

    tokens_total: int
    tokens_used: int  # needed by sessions, each rounded up to the allocator's unit
    sessions: int  # sessions that hold at least one token


@dataclass(frozen=True, slots=True)
class TopKSlices:
    """The k largest logits of R rows, in the host's memory; of equal logits at the k-th place the lowest ids."""

    ids: NDArray[np.int32]  # [R, k], ascending
    logits: NDArray[np.float32]  # [R, k]
    logsumexp: NDArray[np.float32]  # [R], over the whole row
    tempered: NDArray[np.float32]  # [R], over the whole row's logits divided by its temperature


class HeldRows(Protocol):
    """The logits rows of a session's last extend and those that it kept: a snapshot that any thread may read."""

    @property
    def size(self) -> int:
        """Number of rows. The last extend's own rows are the last ones."""

    def index(self, position: int, prefix: int) -> int | None:
        """Index of the row at `position` whose tokens, its own included, have this running hash.

        None if it is not held, or still being computed by the device.
        """

    def slices(self, k: int, rows: Sequence[int] | None = None) -> TopKSlices: ...
    def whole(self, rows: Sequence[int] | None = None) -> NDArray[np.float32]: ...


class Engine(Protocol):
    """A model that extends sessions: `actors.engine.step_engine.StepEngine`, or a synthetic one of the benchmarks.

    `rows`, `values` and `check_extend` may be called from any thread, all other methods from one thread at a time.
    """

    width: int  # logits in a row
    hash_seed: int
    batch_invariant: bool
    devices: Sequence[str]  # names of the hardware that it computes on (`actors.engine.devices`); none if unknown
    rows_on_device: bool  # reading rows waits for a device, so it may not be done on an event loop

    def extend(self, batch: Sequence[Extend]) -> list[Outcome]: ...
    def check_extend(self, extend: Extend) -> None:
        """Raise for an extend that can never succeed."""

    def shared(self, blocks: Sequence[int]) -> int:
        """Number of a sequence's leading blocks that some session holds. blocks: the running hash after each."""

    def fork(self, session: int, tokens: Sequence[int], blocks: Sequence[int], age: int) -> bool:
        """Let a session hold `tokens` that another one holds: one copy for each layer, no forward.

        tokens: whole blocks from the first token on, compared one by one. blocks: the running hash after each.
        Returns False if no session holds them or without room: a fork evicts no other session. The session then holds
        no tokens, or those that it held before.
        """

    def rows(self, session: int) -> HeldRows | None: ...
    def values(self, rows: Sequence[tuple[Any, int]], counts: Sequence[int], ids: NDArray[Any]) -> NDArray[np.float32]:
        """The logits [N] at ids [N]. rows: pairs of a result of `rows` and a row's index; counts: ids of each row."""

    def reduce(self, sessions: Sequence[int], k: int, temperatures: Sequence[float] | None = None) -> TopKSlices:
        """The slices of the rows of the last extends of `sessions`, in their order.

        temperatures: of each row's `TopKSlices.tempered`; None for 1.
        """

    def whole(self, sessions: Sequence[int]) -> NDArray[np.float32]: ...
    def close(self, session: int) -> None: ...
    def cache_stats(self) -> CacheStats: ...
    def check(self) -> None:
        """Prove that the cache's accounts are exact; AssertionError if not."""

    def check_health(self) -> None:
        """Raise if the engine cannot continue."""
