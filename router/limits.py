"""How much one key may ask of one router. Several routers count apart, so that each has the whole limit."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from actors.config import LimitsConfig
from router.backend import Overloaded

Clock = Callable[[], float]
_OPEN_RETRY_S = 1.0  # when an open request ends is not known


class Bucket:
    """So many requests a minute on average, and as many at once after a minute without any."""

    def __init__(self, per_minute: float, clock: Clock) -> None:
        self._per_second = per_minute / 60  # per second
        self._capacity = self._available = max(1.0, per_minute)
        self._clock, self._updated_at = clock, clock()

    def take(self) -> float:
        """Seconds until there is room for the next request; 0 where there was, and this one has taken it."""
        now = self._clock()
        self._available = min(self._capacity, self._available + (now - self._updated_at) * self._per_second)
        self._updated_at = now
        if self._available < 1 - 1e-9:  # what dripped in meanwhile is rounded
            return (1 - self._available) / self._per_second
        self._available -= 1
        return 0.0


class Limits:
    """What each key has open, and what is left of its minute."""

    def __init__(self, config: LimitsConfig, clock: Clock = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._open: Counter[str] = Counter()
        self._buckets: dict[str, Bucket] = {}

    def enter(self, name: str) -> None:
        """A request of that key begins; `leave` must follow. Raises Overloaded, and then nothing has begun."""
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
        """A request that was let in has ended."""
        self._open[name] -= 1
