"""Limits per API key. Each router counts for itself, so each one allows the whole limit."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from actors.config import LimitsConfig
from router.backend import Overloaded

Clock = Callable[[], float]
_OPEN_RETRY_S = 1.0  # the end of an open request cannot be predicted


class Bucket:
    """A token bucket of requests: refills `per_minute` a minute and holds at most that many, but at least one."""

    def __init__(self, per_minute: float, clock: Clock) -> None:
        self._per_second = per_minute / 60
        self._capacity = self._available = max(1.0, per_minute)
        self._clock, self._updated_at = clock, clock()

    def take(self) -> float:
        """Take one request from the bucket: 0 on success, else the seconds until the next one fits."""
        now = self._clock()
        self._available = min(self._capacity, self._available + (now - self._updated_at) * self._per_second)
        self._updated_at = now
        if self._available < 1 - 1e-9:  # tolerates rounding of the refill
            return (1 - self._available) / self._per_second
        self._available -= 1
        return 0.0


class Limits:
    """Open requests and request rate of each key."""

    def __init__(self, config: LimitsConfig, clock: Clock = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._open: Counter[str] = Counter()
        self._buckets: dict[str, Bucket] = {}

    def enter(self, name: str) -> None:
        """Count a new request of a key; `leave` must follow. Raises Overloaded without counting it."""
        most, per_minute = self._config.open_requests, self._config.requests_per_minute
        if most is not None and self._open[name] >= most:
            raise Overloaded(
                f"{most} requests of this key are open, which is all that it may have",
                code="rate_limit_exceeded",
                retry_after_s=_OPEN_RETRY_S,
            )
        if per_minute is not None:
            bucket = self._buckets.setdefault(name, Bucket(per_minute, self._clock))
            if wait_s := bucket.take():
                raise Overloaded(
                    f"this key may send {per_minute:g} requests a minute",
                    code="rate_limit_exceeded",
                    retry_after_s=wait_s,
                )
        self._open[name] += 1

    def leave(self, name: str) -> None:
        """Count the end of a request that `enter` accepted."""
        self._open[name] -= 1
