"""How long a model's forward takes, learnt from what its replica reports."""

from __future__ import annotations

import bisect
import math

_SMOOTHING = 0.2  # weight of the newest forward in a running mean


class Pace:
    """Seconds of a forward by the number of tokens in it. Between what was seen it is interpolated."""

    def __init__(self) -> None:
        self._tokens: list[int] = []  # bounds of buckets of which a forward was seen, ascending
        self._seconds: list[float] = []

    def observe(self, tokens: int, seconds: float) -> None:
        """A forward of so many tokens took so long."""
        if tokens < 1:
            return
        bound = _bucket(tokens)
        at = bisect.bisect_left(self._tokens, bound)
        if at == len(self._tokens) or self._tokens[at] != bound:
            self._tokens.insert(at, bound)
            self._seconds.insert(at, seconds)
        else:
            self._seconds[at] += _SMOOTHING * (seconds - self._seconds[at])

    def seconds(self, tokens: int) -> float:
        """What a forward of so many tokens is expected to take; beyond what was seen as long as the nearest."""
        if not self._tokens:
            return 0.0
        bound = _bucket(max(tokens, 1))
        at = bisect.bisect_left(self._tokens, bound)
        if at == len(self._tokens):
            return self._seconds[-1]
        if self._tokens[at] == bound or at == 0:
            return self._seconds[at]
        low, high = self._tokens[at - 1], self._tokens[at]
        share = (bound - low) / (high - low)
        return self._seconds[at - 1] + share * (self._seconds[at] - self._seconds[at - 1])


def _bucket(tokens: int) -> int:
    """Counts up to 8 by themselves, then four to an octave."""
    if tokens <= 8:
        return tokens
    step = 1 << (int(math.log2(tokens - 1)) - 2)
    return -(-tokens // step) * step
