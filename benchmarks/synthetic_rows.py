"""Rows as wide as a published model's, with tails of a known weight, for three roles that belong together.

The logits of target and guider are -exponent * log(rank), each in a ranking of its own around a common one, so that
half of their 128 likeliest ids are the same; the guider base is the guider with noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.api.generation import ROLES, Role
from actors.decoding.hashing import derive_seed, extend_hashes
from actors.engine.errors import BadExtend
from actors.engine.interface import CacheStats, Extend, Held, KVMiss, Outcome, TopKSlices
from benchmarks.null_engine import PUBLISHED_WIDTH

_OWN_NOISE = 0.95  # of a ranking, in nats of rank: half of the 128 likeliest ids are shared
_HEAD = 128  # the guider's ranks from which on a far base falls away
_KEPT = 4  # positions whose rows are kept


@dataclass(frozen=True, slots=True)
class Tail:
    """A family of rows. Logits and nats.

    base_noise: standard deviation of the base around the guider. far: by how much the base falls below the guider with
    every doubling of the guider's rank past the head, up to one doubling.
    """

    exponent: float
    base_noise: float = 0.5
    far: float = 0.0

    def __str__(self) -> str:
        return f"zipf {self.exponent:g}" + (f", base {self.far:g} nats below" if self.far else "")


class WholeRow:
    """One row [width]: its logsumexp at a temperature, and its head, are computed when they are first needed."""

    def __init__(self, logits: NDArray[np.float32]) -> None:
        self.logits = logits
        self._sums: dict[float, np.float32] = {}  # by temperature
        self._heads: dict[int, tuple[NDArray[np.int32], NDArray[np.float32]]] = {}  # by k

    def log_sum(self, temperature: float = 1.0) -> np.float32:
        """The logsumexp of the logits over a temperature."""
        if temperature not in self._sums:
            wide = self.logits.astype(np.float64) / temperature
            self._sums[temperature] = np.float32(wide.max() + np.log(np.exp(wide - wide.max()).sum()))
        return self._sums[temperature]

    def head(self, k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The k likeliest ids, ascending, and their logits; ties at the k-th place go to the lowest ids."""
        if k not in self._heads:
            ids = np.sort(self._find_top(k))
            self._heads[k] = ids, self.logits[ids]
        return self._heads[k]

    def _find_top(self, k: int) -> NDArray[np.int32]:
        least = np.partition(self.logits, -k)[-k] if 0 < k < len(self.logits) else -np.inf
        ids = np.flatnonzero(self.logits >= least) if k else np.zeros(0, np.int64)
        return ids[np.argsort(-self.logits[ids], kind="stable")][:k].astype(np.int32)


class TailStream:
    """The rows of a tail by position, the same at every call.

    cycle: after so many positions they come again, and are kept; None: never.
    """

    def __init__(self, tail: Tail, width: int = PUBLISHED_WIDTH, seed: int = 0, cycle: int | None = None) -> None:
        self.tail, self.width, self._seed, self._cycle = tail, width, seed, cycle
        self._kept: dict[int, dict[Role, WholeRow]] = {}

    def at(self, position: int) -> dict[Role, WholeRow]:
        """The row of every role at a position."""
        position %= self._cycle or position + 1
        if position not in self._kept:
            while len(self._kept) >= (self._cycle or _KEPT):
                del self._kept[next(iter(self._kept))]
            self._kept[position] = self._make(np.random.default_rng([self._seed, position]))
        return self._kept[position]

    def _make(self, rng: np.random.Generator) -> dict[Role, WholeRow]:
        tail, width = self.tail, self.width
        common = np.log1p(rng.permutation(width).astype(np.float32))
        noise = rng.standard_normal((3, width), np.float32)
        target, guider = (np.log(_ranks(common + _OWN_NOISE * own)) for own in noise[:2])
        base: NDArray[np.float32] = -tail.exponent * guider + tail.base_noise * noise[2]
        if tail.far:
            base -= tail.far * np.clip((guider - np.log(_HEAD)) / np.log(2), 0, 1)
        return {
            "target": WholeRow((-tail.exponent * target).astype(np.float32)),
            "guider": WholeRow((-tail.exponent * guider).astype(np.float32)),
            "guider_base": WholeRow(base),
        }


def _ranks(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """The rank of each score, the lowest being 1."""
    ranks = np.empty(len(scores), np.float32)
    ranks[np.argsort(scores)] = np.arange(1, len(scores) + 1, dtype=np.float32)
    return ranks


@dataclass(frozen=True, slots=True)
class TailRows:
    """The row of a session's last token, and those that its extend kept."""

    stream: TailStream
    role: Role
    position: int  # of the first row
    hashes: tuple[int, ...]

    @property
    def size(self) -> int:
        """Rows held."""
        return len(self.hashes)

    @property
    def length(self) -> int:
        """Tokens that the session holds."""
        return self.position + len(self.hashes)

    def index(self, position: int, prefix: int) -> int | None:
        row = position - self.position
        return row if 0 <= row < len(self.hashes) and self.hashes[row] == prefix else None

    def slices(self, k: int, rows: Sequence[int] | None = None) -> TopKSlices:
        return side_by_side([self.row(row) for row in self._rows(rows)], k)

    def whole(self, rows: Sequence[int] | None = None) -> NDArray[np.float32]:
        return np.stack([self.row(row).logits for row in self._rows(rows)])

    def row(self, row: int) -> WholeRow:
        """One of them."""
        return self.stream.at(self.position + row)[self.role]

    def _rows(self, rows: Sequence[int] | None) -> Sequence[int]:
        return range(len(self.hashes)) if rows is None else rows


def side_by_side(rows: Sequence[WholeRow], k: int, temperatures: Sequence[float] | None = None) -> TopKSlices:
    """The slices of some rows."""
    heats = [1.0] * len(rows) if temperatures is None else temperatures
    heads = [row.head(k) for row in rows]
    return TopKSlices(
        np.array([ids for ids, _ in heads], np.int32).reshape(len(rows), -1),
        np.array([logits for _, logits in heads], np.float32).reshape(len(rows), -1),
        np.array([row.log_sum() for row in rows], np.float32),
        np.array([row.log_sum(heat) for row, heat in zip(rows, heats, strict=True)], np.float32),
    )


class TailEngine:
    """An engine (`actors.replica.engine_thread.Engine`) that plays one role of a stream; one row an extend."""

    batch_invariant = True
    rows_on_device = False
    devices: Sequence[str] = ()

    def __init__(self, stream: TailStream, role: Role, cache_tokens: int = 1 << 20) -> None:
        self._stream, self._role, self._cache_tokens = stream, role, cache_tokens
        self.width = stream.width
        self.hash_seed = derive_seed(stream.width, ROLES.index(role))
        self._held: dict[int, TailRows] = {}

    def check_extend(self, extend: Extend) -> None:
        """Raise BadExtend for more rows than one."""
        if extend.rows > 1:
            raise BadExtend(extend.session, "a tail engine gives one row an extend: switch drafts off")

    def extend(self, batch: Sequence[Extend]) -> list[Outcome]:
        """Take the tokens of every extend that goes on where the session stands; outcomes in their order."""
        return [self._extend_one(extend) for extend in batch]

    def shared(self, blocks: Sequence[int]) -> int:
        """Nothing is shared."""
        return 0

    def fork(self, session: int, tokens: Sequence[int], blocks: Sequence[int], age: int) -> bool:
        """Nothing is forked."""
        return False

    def rows(self, session: int) -> TailRows | None:
        return self._held.get(session)

    def values(
        self, rows: Sequence[tuple[TailRows, int]], counts: Sequence[int], ids: NDArray[Any]
    ) -> NDArray[np.float32]:
        """The logits [N] of held rows at ids [N], of which `counts` belong to each row in turn."""
        numbers: dict[int, tuple[int, WholeRow]] = {}  # the different ones among the rows
        which = []
        for held, place in rows:
            row = held.row(place)
            which.append(numbers.setdefault(id(row), (len(numbers), row))[0])
        if len(numbers) == 1:
            return row.logits.take(ids)
        owner, values = np.repeat(which, counts), np.empty(len(ids), np.float32)
        for number, row in numbers.values():
            mine = owner == number
            values[mine] = row.logits[ids[mine]]
        return values

    def reduce(self, sessions: Sequence[int], k: int, temperatures: Sequence[float] | None = None) -> TopKSlices:
        """The slices of the last rows of `sessions`, in their order."""
        return side_by_side([self._last(session) for session in sessions], k, temperatures)

    def whole(self, sessions: Sequence[int]) -> NDArray[np.float32]:
        """The whole last rows [R, width] of `sessions`, in their order."""
        return np.stack([self._last(session).logits for session in sessions])

    def close(self, session: int) -> None:
        self._held.pop(session, None)

    def check_health(self) -> None:
        """Never raises."""

    def check(self) -> None:
        """No room is shared out, so no account can be wrong."""

    def cache_stats(self) -> CacheStats:
        return CacheStats(self._cache_tokens, sum(rows.length for rows in self._held.values()), len(self._held))

    def _last(self, session: int) -> WholeRow:
        held = self._held[session]
        return held.row(held.size - 1)

    def _extend_one(self, extend: Extend) -> Outcome:
        held = self._held.get(extend.session)
        length = held.length if held is not None else 0
        if extend.position > length:
            return KVMiss(extend.session, length)
        named = extend_hashes(extend.prefix, extend.tokens)[-1:]
        kept = list(held.hashes) if held is not None and extend.keep else []
        hashes = tuple(kept + named)
        self._held[extend.session] = TailRows(self._stream, self._role, extend.end - len(hashes), hashes)
        return Held(extend.session, extend.end, extend.rows)
