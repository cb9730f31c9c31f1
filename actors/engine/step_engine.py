"""The engine of one model: sessions, the admission of their extends to steps, and the rows of their last extends.

What computes a step is a runner (`actors.engine.runner`): a model with its KV cache. The engine does not know which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.engine.errors import BadExtend, RowGone, StepFailed
from actors.engine.interface import CacheStats, Extend, Full, Held, KVMiss, Outcome, TopKSlices
from actors.engine.rows import (
    DeviceRows,
    LogitsRowStore,
    RowBlock,
    RowLocation,
    gather_rows,
    reduce_rows,
    row_budget,
    to_host,
    values_at,
)
from actors.engine.runner import Runner
from actors.engine.sessions import SessionTable, seniority

R = TypeVar("R", bound=Runner)


class StepEngine(Generic[R]):
    """Extends sessions of one causal language model. One thread calls it; `rows` may be called from any thread.

    max_held_rows: logits rows in memory for lookups, width x 4 bytes each; None for those of 450 sessions with drafts,
    or fewer to fit a share of the memory.
    """

    def __init__(self, runner: R, max_held_rows: int | None = None) -> None:
        self.runner = runner
        self.width, self.hash_seed, self.batch_invariant = runner.width, runner.digest, runner.batch_invariant
        self.devices: Sequence[str] = runner.devices
        self.rows_on_device = runner.device.type != "cpu"
        self._cache = runner.cache
        self._table = SessionTable(self._cache, self.hash_seed)
        self._store = LogitsRowStore(max_held_rows or row_budget(self.width, runner.device))

    def extend(self, batch: Sequence[Extend]) -> list[Outcome]:
        """Run one forward for all extends that can run now, at most one of each session; return outcomes in order.

        Raises BadExtend, without any change, for an extend that can never succeed. Raises StepFailed if the forward
        raises: then every session of this step is dropped and gets `KVMiss(0)` next. Example, session 1 holding 10
        tokens, session 2 none, with a cache of 64 tokens (units of 32):

            Extend(1, position=8, tokens=(a, b, c), rows=3)   -> Held(1, length=11, rows=3)  rows 8, 9, 10
            Extend(2, position=0, tokens=(d,) * 20, rows=1)   -> Held(2, length=20, rows=1)  row 19
            Extend(3, position=5, tokens=(e,), rows=1)        -> KVMiss(3, held=0)           send from position 0

        The first two run as 23 packed tokens. Tokens 8 and 9 of session 1, rejected drafts, are overwritten.
        """
        self.check_batch(batch)
        answers = self._table.admit(self._within_row_budget(batch))
        outcomes = [self._outcome(extend, answers) for extend in batch]
        admitted = [extend for extend, outcome in zip(batch, outcomes, strict=True) if isinstance(outcome, Held)]
        if admitted:
            self._run(admitted)
        return outcomes

    def check_batch(self, batch: Sequence[Extend]) -> None:
        """Raise BadExtend if an extend of the batch can never succeed, or if two extend the same session."""
        if len({extend.session for extend in batch}) < len(batch):
            raise BadExtend(batch[0].session, "a session may be extended once in a step")
        for extend in batch:
            self.check_extend(extend)

    def check_extend(self, extend: Extend) -> None:
        """Raise BadExtend for an extend that can never succeed, so that it is refused before it joins a batch."""
        if not extend.tokens:
            raise BadExtend(extend.session, "an extend needs at least one token")
        if not 0 <= extend.rows <= len(extend.tokens):
            raise BadExtend(extend.session, f"{extend.rows} rows of {len(extend.tokens)} tokens")
        if extend.position < 0:
            raise BadExtend(extend.session, f"position {extend.position} is negative")
        if min(extend.tokens) < 0 or max(extend.tokens) >= self.runner.vocabulary:
            raise BadExtend(extend.session, f"token ids must lie in [0, {self.runner.vocabulary})")
        total = self._cache.total
        if extend.end > total:
            raise BadExtend(extend.session, f"{extend.end} tokens do not fit a cache of {total}")
        if self.runner.positions is not None and extend.end > self.runner.positions:
            raise BadExtend(extend.session, f"{extend.end} tokens, and the model has {self.runner.positions} positions")
        if self.runner.padded(extend.rows) > self._store.budget:
            raise BadExtend(extend.session, f"{extend.rows} rows, at most {self._store.budget} are held")

    def rows(self, session: int) -> DeviceRows | None:
        """The rows of the session's last extend and those that it kept, or None. Callable from any thread."""
        return self._store.get(session)

    def values(
        self, rows: Sequence[tuple[DeviceRows, int]], counts: Sequence[int], ids: NDArray[Any]
    ) -> NDArray[np.float32]:
        return values_at([held.places[row] for held, row in rows], counts, ids)

    def reduce(self, sessions: Sequence[int], k: int, temperatures: Sequence[float] | None = None) -> TopKSlices:
        """The slices of the rows of the last extends of `sessions`, in order. Raises RowGone if one has none."""
        return reduce_rows(self._fresh_rows(sessions), k, self.batch_invariant, temperatures)

    def whole(self, sessions: Sequence[int]) -> NDArray[np.float32]:
        """The full rows [R, V] of the last extends of `sessions`, in order. Raises RowGone if one has none."""
        return to_host(self._fresh_rows(sessions))

    def plain_logits(self, tokens: Sequence[int]) -> list[Tensor]:
        """See Runner.plain_logits."""
        return self.runner.plain_logits(tokens)

    def close(self, session: int) -> None:
        """Drop a session's cache and its rows."""
        self._table.evict(session)
        self._store.drop(session)

    def evict(self, session: int) -> None:
        """Drop a session's cache: its next extend gets `KVMiss(0)`. Its held rows stay readable."""
        self._table.evict(session)

    def shared(self, blocks: Sequence[int]) -> int:
        return self._table.shared(blocks)

    def fork(self, session: int, tokens: Sequence[int], blocks: Sequence[int], age: int) -> bool:
        return self._table.fork(session, tokens, blocks, age)

    def cache_stats(self) -> CacheStats:
        return CacheStats(self._cache.total, self._cache.used, len(self._table.sessions))

    def check_health(self) -> None:
        """Raise if the engine cannot continue. An engine in one process always can."""

    def check(self) -> None:
        """Prove that free + used = all and that every extent, hash and row is consistent; AssertionError if not."""
        self._table.check()
        self._store.check()

    @staticmethod
    def _outcome(extend: Extend, answers: Mapping[int, KVMiss | Full | None]) -> Outcome:
        refusal = answers.get(extend.session, Full(extend.session))  # absent: over the row budget
        return Held(extend.session, extend.end, extend.rows) if refusal is None else refusal

    def _within_row_budget(self, batch: Sequence[Extend]) -> list[Extend]:
        """The oldest extends whose rows fit the row budget together. One alone always fits."""
        fitting, rows = [], 0
        for extend in sorted(batch, key=seniority):
            if self.runner.padded(rows + extend.rows) <= self._store.budget:
                fitting.append(extend)
                rows += extend.rows
        return fitting

    def _run(self, admitted: Sequence[Extend]) -> None:
        sessions = [extend.session for extend in admitted]
        for extend in admitted:
            if not extend.keep:
                self._store.drop(extend.session)
        self._store.make_room(self.runner.padded(sum(extend.rows for extend in admitted)))
        try:
            logits = self.runner.forward(admitted)
        except BaseException as error:
            # Their cache may be half written.
            for session in sessions:
                self.close(session)
            if isinstance(error, Exception):
                raise StepFailed(sessions, error) from error
            raise
        for extend in admitted:
            self._table.commit(extend)
        self._hold(admitted, logits)

    def _hold(self, admitted: Sequence[Extend], logits: Tensor) -> None:
        block, first = RowBlock.behind_forward(logits), 0
        for extend in admitted:
            if extend.rows:
                hashes = tuple(self._table.sessions[extend.session].hashes[-extend.rows :])
                places = tuple(RowLocation(block, row) for row in range(first, first + extend.rows))
                rows = DeviceRows(extend.end - extend.rows, hashes, places, self.batch_invariant, extend.rows)
                self._store.hold(extend.session, rows, extend.position, extend.keep)
                first += extend.rows

    def _fresh_rows(self, sessions: Sequence[int]) -> Tensor:
        places: list[RowLocation] = []
        for session in sessions:
            held = self._store.get(session)
            if held is None:
                raise RowGone(session)
            places += held.places[-held.fresh :]
        return gather_rows(places) if places else torch.zeros(0, self.width)
