"""The time that a model waits for further extends before it starts a forward.

Coordinators that were answered together send their next extends at almost the same time. A forward that starts with
the first of them leaves the others to the next forward: two forwards, each half full. A fixed delay would slow down a
single coordinator. Instead, the model learns each coordinator's response time, from an answer to its next extend, and
waits for it only while it is expected within a share of a forward's duration.

Example, a forward takes 10 ms, share 0.5, and coordinators A and B are answered at 0 ms; A usually responds after
1.0 ms and B after 1.4 ms, with deviations of 0.1 ms and the least one of 0.2 ms:
    1.0 ms  A's extend arrives. B counts as late at 1.4 + 2 * 0.2 = 1.8 ms, within 1.0 + 0.5 * 10 ms: wait.
    1.3 ms  B's extend arrives. No coordinator is expected any more: the forward starts, with both.
    1.8 ms  If B had not come, the forward would start with A alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_SMOOTHING = 0.2  # weight of the newest sample in the running means
_MARGIN = 2.0  # a coordinator is late after its mean plus so many deviations
_LEAST_DEVIATION_S = 2e-4  # the resolution of the event loop's timers


@dataclass(slots=True)
class _ResponseTime:
    """One coordinator's time from an answer to its next extend, in seconds."""

    answered_at: float | None = None  # None: its extend has arrived
    mean: float | None = None  # None: no sample yet
    deviation: float = 0.0

    def learn(self, sample: float) -> None:
        if self.mean is None:
            self.mean, self.deviation = sample, sample / 2
            return
        self.deviation += _SMOOTHING * (abs(sample - self.mean) - self.deviation)
        self.mean += _SMOOTHING * (sample - self.mean)

    def late_after(self) -> float:
        """Seconds after an answer at which the coordinator is late; infinite without a sample."""
        return math.inf if self.mean is None else self.mean + _MARGIN * max(self.deviation, _LEAST_DEVIATION_S)


class BatchingDelay:
    """Decides how long to wait before a forward: at most `share` of its usual duration, and at most `cap_s` seconds.

    If either is 0, it never waits.
    """

    def __init__(self, share: float = 0.5, cap_s: float = 0.01) -> None:
        self._share, self._cap_s = share, cap_s
        self._response_times: dict[object, _ResponseTime] = {}
        self._expected_by: dict[object, float] = {}  # by coordinator: when its next extend is late
        self._forward_s = 0.0

    @property
    def forward_s(self) -> float:
        """Running mean of a forward's duration, in seconds."""
        return self._forward_s

    def arrived(self, peer: object, now: float) -> None:
        """Record that an extend of this coordinator arrived."""
        self._expected_by.pop(peer, None)
        response_time = self._response_times.get(peer)
        if response_time is not None and response_time.answered_at is not None:
            response_time.learn(now - response_time.answered_at)
            response_time.answered_at = None

    def answered(self, peer: object, now: float) -> None:
        """Record that this coordinator was answered, so that its next extend is expected."""
        response_time = self._response_times.setdefault(peer, _ResponseTime())
        response_time.answered_at = now
        self._expected_by[peer] = now + response_time.late_after()

    def forget(self, peer: object) -> None:
        """Forget a coordinator that has disconnected, or has no session here."""
        self._response_times.pop(peer, None)
        self._expected_by.pop(peer, None)

    def forward_took(self, seconds: float) -> None:
        weight = _SMOOTHING if self._forward_s else 1.0
        self._forward_s += weight * (seconds - self._forward_s)

    def wait_until(self, opened: float, now: float) -> float | None:
        """The time until which to wait, if the first extend came at `opened`; None: run the forward now."""
        if not self._expected_by:
            return None
        limit = opened + min(self._share * self._forward_s, self._cap_s)
        return max((due for due in self._expected_by.values() if now < due <= limit), default=None)
