"""A model that computes nothing: it keeps the promises of an engine and serves rows from a small bank.

What remains of a step's time is the exchange. A row is chosen from the bank by the running hash of its tokens, so the
same tokens have the same row at every replica, and a slice, a lookup and a whole row of it agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.decoding.hashing import derive_seed, extend_hashes
from actors.engine.errors import BadExtend
from actors.engine.interface import BLOCK, CacheStats, Extend, Full, Held, KVMiss, Outcome, TopKSlices

PUBLISHED_WIDTH = 152_064  # of the published target
BANK_ROWS = 8
_EXPONENT = 2.2  # logits of a tail fall like rank^-exponent
_SEED = 0  # of the rankings, and of the noise of each role


class RowBank:
    """Rows [R, width] of logits, with their order and logsumexp. A running hash chooses one of them."""

    def __init__(self, logits: NDArray[np.float32]) -> None:
        self.logits = logits
        self.order = np.argsort(-logits, axis=-1, kind="stable").astype(np.int32)
        self.logsumexp = log_sums(logits)
        self._sums = {1.0: self.logsumexp}  # by temperature
        self._heads: dict[int, tuple[NDArray[np.int32], NDArray[np.float32]]] = {}  # by k

    def number(self, prefix: int) -> int:
        """The number of the row after tokens with this running hash."""
        return prefix % len(self.logits)

    def slices(self, rows: Sequence[int], k: int, temperatures: Sequence[float] | None = None) -> TopKSlices:
        """Rows of the bank, reduced to k."""
        index = np.asarray(rows, np.int64)
        ids, logits = self._head(k)
        heats = [1.0] * len(index) if temperatures is None else temperatures
        tempered = [self._tempered_sums(heat)[row] for heat, row in zip(heats, index.tolist(), strict=True)]
        return TopKSlices(ids[index], logits[index], self.logsumexp[index], np.array(tempered, np.float32))

    def _tempered_sums(self, temperature: float) -> NDArray[np.float32]:
        """The logsumexp [size] of every row's logits over a temperature."""
        if temperature not in self._sums:
            self._sums[temperature] = log_sums(self.logits / temperature)
        return self._sums[temperature]

    def _head(self, k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The k likeliest ids [size, k] of every row, ascending, and their logits."""
        if k not in self._heads:
            ids = np.sort(self.order[:, :k], axis=1)
            self._heads[k] = ids, np.take_along_axis(self.logits, ids, 1)
        return self._heads[k]


def log_sums(logits: NDArray[Any]) -> NDArray[np.float32]:
    """The logsumexp [size] of rows [size, width]."""
    peak = logits.max(-1, keepdims=True)
    sums: NDArray[np.float32] = (peak[:, 0] + np.log(np.exp((logits - peak).astype(np.float64)).sum(-1))).astype("f4")
    return sums


def shared_ranks(width: int) -> NDArray[np.int64]:
    """The rank [BANK_ROWS, width] of every id in each row of a bank, 0 for the likeliest; the same for all roles."""
    shared = np.random.default_rng(_SEED)
    return np.stack([shared.permutation(width) for _ in range(BANK_ROWS)])


def tail_logits(ranks: NDArray[np.int64], role: str) -> NDArray[np.float32]:
    """The logits [R, width] of ids with these ranks, with noise of the role's own: the heads of three roles overlap."""
    own = np.random.default_rng([_SEED, *role.encode()])
    logits: NDArray[np.float32] = (own.normal(0, 0.5, ranks.shape) - _EXPONENT * np.log1p(ranks)).astype(np.float32)
    return logits


def tail_bank(width: int, role: str) -> RowBank:
    """The rows of one role."""
    return RowBank(tail_logits(shared_ranks(width), role))


@dataclass(frozen=True, slots=True)
class NullRows:
    """The rows of a session's last extend and of those that it kept."""

    bank: RowBank
    position: int
    hashes: tuple[int, ...]
    fresh: int  # how many are the last extend's own

    @property
    def size(self) -> int:
        """Rows held."""
        return len(self.hashes)

    def index(self, position: int, prefix: int) -> int | None:
        row = position - self.position
        return row if 0 <= row < len(self.hashes) and self.hashes[row] == prefix else None

    def slices(self, k: int, rows: Sequence[int] | None = None) -> TopKSlices:
        return self.bank.slices(self._numbers(rows), k)

    def whole(self, rows: Sequence[int] | None = None) -> NDArray[np.float32]:
        taken: NDArray[np.float32] = self.bank.logits[self._numbers(rows)]
        return taken

    def last(self, position: int, count: int) -> tuple[int, ...]:
        """The hashes of at most `count` rows directly before `position`."""
        end = position - self.position
        return self.hashes[max(0, end - count) : end] if 0 < end <= self.size else ()

    def number(self, row: int) -> int:
        """The number of its row in the bank."""
        return self.bank.number(self.hashes[row])

    def fresh_numbers(self) -> list[int]:
        """Numbers of the last extend's rows in the bank."""
        return self._numbers(range(len(self.hashes) - self.fresh, len(self.hashes)))

    def _numbers(self, rows: Sequence[int] | None) -> list[int]:
        return [self.number(row) for row in (range(len(self.hashes)) if rows is None else rows)]


class NullEngine:
    """An engine (`actors.replica.engine_thread.Engine`) without a model.

    cache_tokens: of all sessions together. bank: its rows; None for a tail without peaks.
    """

    batch_invariant = True
    rows_on_device = False
    devices: Sequence[str] = ()

    def __init__(
        self,
        width: int = PUBLISHED_WIDTH,
        role: str = "target",
        cache_tokens: int = 1 << 20,
        bank: RowBank | None = None,
    ) -> None:
        self.width = width
        self.hash_seed = derive_seed(width, *role.encode())
        self._bank = tail_bank(width, role) if bank is None else bank
        self._cache_tokens = cache_tokens
        self._used = 0
        self._hashes: dict[int, list[int]] = {}  # by session, after 0, 1, 2 ... tokens
        self._rows: dict[int, NullRows] = {}

    def check_extend(self, extend: Extend) -> None:
        """Raise BadExtend for an extend that can never succeed."""
        if not extend.tokens or not 0 <= extend.rows <= len(extend.tokens) or extend.position < 0:
            raise BadExtend(extend.session, f"{extend.rows} rows of {len(extend.tokens)} tokens at {extend.position}")
        if min(extend.tokens) < 0 or max(extend.tokens) >= self.width:
            raise BadExtend(extend.session, f"token ids must lie in [0, {self.width})")
        if extend.end > self._cache_tokens:
            raise BadExtend(extend.session, f"{extend.end} tokens do not fit a cache of {self._cache_tokens}")

    def extend(self, batch: Sequence[Extend]) -> list[Outcome]:
        """Take the tokens of every extend that matches what is held; outcomes in their order."""
        return [self._extend_one(extend) for extend in batch]

    def shared(self, blocks: Sequence[int]) -> int:
        """Number of a sequence's first blocks that some session holds."""
        held = {block for hashes in self._hashes.values() for block in hashes[BLOCK::BLOCK]}
        return next((count for count, block in enumerate(blocks) if block not in held), len(blocks))

    def fork(self, session: int, tokens: Sequence[int], blocks: Sequence[int], age: int) -> bool:
        """Let a session hold `tokens`, whole blocks that some session holds; False if none does, or without room."""
        end = len(tokens)
        source = next((of for of in self._hashes.values() if len(of) > end and of[end] == blocks[-1]), None)
        room = self._cache_tokens - self._used + len(self._hashes.get(session, [0])) - 1
        if source is None or end > room:
            return False
        source = source[: end + 1]
        self.close(session)
        self._hashes[session] = source
        self._used += end
        return True

    def rows(self, session: int) -> NullRows | None:
        return self._rows.get(session)

    def values(
        self, rows: Sequence[tuple[NullRows, int]], counts: Sequence[int], ids: NDArray[Any]
    ) -> NDArray[np.float32]:
        """The logits [N] of held rows at ids [N], of which `counts` belong to each row in turn."""
        numbers = np.array([held.number(row) for held, row in rows], np.int64)
        values: NDArray[np.float32] = self._bank.logits.take(np.repeat(numbers * self.width, counts) + ids)
        return values

    def reduce(self, sessions: Sequence[int], k: int, temperatures: Sequence[float] | None = None) -> TopKSlices:
        """The slices of the rows that the last extends of `sessions` gave, in their order."""
        return self._bank.slices(self._numbers(sessions), k, temperatures)

    def whole(self, sessions: Sequence[int]) -> NDArray[np.float32]:
        """The whole rows [R, width] that the last extends of `sessions` gave, in their order."""
        rows: NDArray[np.float32] = self._bank.logits[self._numbers(sessions)]
        return rows

    def close(self, session: int) -> None:
        self._used -= len(self._hashes.pop(session, [0])) - 1
        self._rows.pop(session, None)

    def check_health(self) -> None:
        """Never raises."""

    def check(self) -> None:
        """Prove that the tokens in use are those of the sessions."""
        assert self._used == sum(len(hashes) - 1 for hashes in self._hashes.values())

    def cache_stats(self) -> CacheStats:
        return CacheStats(self._cache_tokens, self._used, len(self._hashes))

    def _extend_one(self, extend: Extend) -> Outcome:
        hashes = self._hashes.setdefault(extend.session, [self.hash_seed])
        if extend.position >= len(hashes):
            return KVMiss(extend.session, len(hashes) - 1)
        if hashes[extend.position] != extend.prefix:
            return KVMiss(extend.session, 0)
        used = self._used - (len(hashes) - 1) + extend.end
        if used > self._cache_tokens:
            return Full(extend.session)
        self._used = used
        after = extend_hashes(extend.prefix, extend.tokens)
        hashes[extend.position + 1 :] = after
        named = tuple(after[len(after) - extend.rows :])
        before = self._rows.get(extend.session) if extend.keep else None
        kept = before.last(extend.position, extend.keep) if before is not None else ()
        self._rows[extend.session] = NullRows(
            self._bank, extend.end - extend.rows - len(kept), kept + named, extend.rows
        )
        return Held(extend.session, extend.end, extend.rows)

    def _numbers(self, sessions: Sequence[int]) -> list[int]:
        return [number for session in sessions for number in self._rows[session].fresh_numbers()]
