"""Answers that must have the same tokens, also from an engine whose rounding depends on the batch.

Such answers may part at a near tie: a token whose two best candidates have almost the same score. Near ties are
recorded within `recorded()` only; without it answers are the same if they are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from actors.decoding.decision import Decisions, decide

NEAR_TIE = 1e-4  # of the embedded trio, whose rows differ between batches by about 1e-5


class NearTies:
    """The decisions of this process's coordinators while they are recorded. parted: answers that part at a near tie.

    limit: below it a margin is a near tie. Scores are combined logits over the temperature, with their noise.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.decisions = self.parted = 0
        self.least = float("inf")  # margin
        self.pairs: list[frozenset[int]] = []  # the two best tokens of each near tie

    def record(self, decisions: Decisions, specs: np.ndarray[Any, Any]) -> None:
        """Note the near ties among decided rows, whose best candidate must be their token."""
        from tests.support.oracle import noise  # loads torch

        outcomes, filtered = decisions.outcomes, decisions.filtered
        for row, (spec, count) in enumerate(zip(specs, decisions.counts, strict=True)):
            if outcomes["no_legal_token"][row]:
                continue
            ids, scores = decisions.ids[row, :count], filtered[row, :count]
            if spec["temperature"]:
                scores = scores + noise(int(spec["seed"]), int(spec["position"]), ids)
            second, best = np.argsort(scores, kind="stable")[-2:] if count > 1 else (0, 0)
            margin = float(scores[best] - scores[second]) if count > 1 else float("inf")
            self.decisions += 1
            self.least = min(self.least, margin)
            if margin < self.limit:
                self.pairs.append(frozenset((int(ids[best]), int(ids[second]))))
            else:
                assert ids[best] == outcomes["token"][row]

    def __str__(self) -> str:
        ties = f"{len(self.pairs)} near ties, at which {self.parted} answers parted"
        return f"{self.decisions} decisions, smallest margin {self.least:.1e}, {ties}"


_recorded: NearTies | None = None


@contextmanager
def recorded(limit: float = NEAR_TIE) -> Iterator[NearTies]:
    """Record the near ties of all decisions in this process."""
    global _recorded
    ties = _recorded = NearTies(limit)

    def recording(block: Any, at: Any, specs: Any, *more: Any) -> Decisions:
        decisions = decide(block, at, specs, *more)
        ties.record(decisions, specs)
        return decisions

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actors.coordinator.verification.decide", recording)
        try:
            yield ties
        finally:
            _recorded = None


def rounding_varies() -> bool:
    """True if near ties are recorded, since rows need not be the same in every batch."""
    return _recorded is not None


def same(found: Sequence[int], expected: Sequence[int]) -> bool:
    """True if two answers have equal tokens, or part at a recorded near tie."""
    if found == expected:
        return True
    pairs = [frozenset(pair) for pair in zip(found, expected, strict=False) if pair[0] != pair[1]]
    if _recorded is None or not pairs or pairs[0] not in _recorded.pairs:
        return False
    _recorded.parted += 1
    return True


def all_same(found: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> bool:
    """True if each answer is the same as the expected one."""
    return all([same(*both) for both in zip(found, expected, strict=True)])
