"""How long a model waits for company before a forward.

Coordinators that were answered together come back at almost the same time, but never at the very same. Taking only
what already waits would run their sessions in turns, each forward half full; waiting for a fixed time would slow a
lone coordinator down. So the model learns how long each coordinator takes from an answer to its next extend, and waits
for one only while it is due within a share of what a forward takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_SMOOTHING = 0.2  # weight of the newest sample in a running mean
_MARGIN = 2.0  # deviations beyond the mean until a coordinator counts as late
_LEAST_DEVIATION_S = 2e-4  # what a timer of an event loop cannot tell apart


@dataclass(slots=True)
class _ResponseTime:
    """One coordinator's time from an answer to its next extend, seconds."""

    answered_at: float | None = None  # None: its extend is here already
    mean: float | None = None  # None: not seen yet
    deviation: float = 0.0

    def learn(self, sample: float) -> None:
        if self.mean is None:
            self.mean, self.deviation = sample, sample / 2
            return
        self.deviation += _SMOOTHING * (abs(sample - self.mean) - self.deviation)
        self.mean += _SMOOTHING * (sample - self.mean)

    def late_after(self) -> float:
        """It is late after so long; infinite as long as nothing is known of it."""
        return math.inf if self.mean is None else self.mean + _MARGIN * max(self.deviation, _LEAST_DEVIATION_S)


class BatchingDelay:
    """share: of a forward's usual duration, the longest wait. cap_s: the longest wait, seconds. 0 never waits."""

    def __init__(self, share: float = 0.5, cap_s: float = 0.01) -> None:
        self._share, self._cap_s = share, cap_s
        self._response_times: dict[object, _ResponseTime] = {}
        self._expected_by: dict[object, float] = {}  # when the next extend of who was answered should have come
        self._forward_s = 0.0

    @property
    def forward_s(self) -> float:
        """Running mean of a forward's duration, seconds."""
        return self._forward_s

    def arrived(self, peer: object, now: float) -> None:
        """An extend of this coordinator came."""
        self._expected_by.pop(peer, None)
        response_time = self._response_times.get(peer)
        if response_time is not None and response_time.answered_at is not None:
            response_time.learn(now - response_time.answered_at)
            response_time.answered_at = None

    def answered(self, peer: object, now: float) -> None:
        """Rows went out to this coordinator, so its next extend is expected."""
        response_time = self._response_times.setdefault(peer, _ResponseTime())
        response_time.answered_at = now
        self._expected_by[peer] = now + response_time.late_after()

    def forget(self, peer: object) -> None:
        """The coordinator is gone, or has no session here."""
        self._response_times.pop(peer, None)
        self._expected_by.pop(peer, None)

    def forward_took(self, seconds: float) -> None:
        weight = _SMOOTHING if self._forward_s else 1.0
        self._forward_s += weight * (seconds - self._forward_s)

    def wait_until(self, opened: float, now: float) -> float | None:
        """Until when to wait for company in a window that opened at `opened`; None: run the forward now."""
        if not self._expected_by:
            return None
        limit = opened + min(self._share * self._forward_s, self._cap_s)
        return max((due for due in self._expected_by.values() if now < due <= limit), default=None)
