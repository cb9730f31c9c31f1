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
class _Habit:
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

    def usual(self) -> float:
        """It is late after so long; infinite as long as nothing is known of it."""
        return math.inf if self.mean is None else self.mean + _MARGIN * max(self.deviation, _LEAST_DEVIATION_S)


class BatchingDelay:
    """share: of a forward's usual duration, the longest wait. cap_s: the longest wait, seconds. 0 never waits."""

    def __init__(self, share: float = 0.5, cap_s: float = 0.01) -> None:
        self._share, self._cap_s = share, cap_s
        self._habits: dict[object, _Habit] = {}
        self._due: dict[object, float] = {}  # when the next extend of who was answered should have come
        self._forward_s = 0.0

    @property
    def forward_s(self) -> float:
        """Running mean of a forward's duration, seconds."""
        return self._forward_s

    def arrived(self, peer: object, now: float) -> None:
        """An extend of this coordinator came."""
        self._due.pop(peer, None)
        habit = self._habits.get(peer)
        if habit is not None and habit.answered_at is not None:
            habit.learn(now - habit.answered_at)
            habit.answered_at = None

    def answered(self, peer: object, now: float) -> None:
        """Rows went out to this coordinator, so its next extend is expected."""
        habit = self._habits.setdefault(peer, _Habit())
        habit.answered_at = now
        self._due[peer] = now + habit.usual()

    def forget(self, peer: object) -> None:
        """The coordinator is gone, or has no session here."""
        self._habits.pop(peer, None)
        self._due.pop(peer, None)

    def forward_took(self, seconds: float) -> None:
        weight = _SMOOTHING if self._forward_s else 1.0
        self._forward_s += weight * (seconds - self._forward_s)

    def wait_until(self, opened: float, now: float) -> float | None:
        """Until when to wait for company in a window that opened at `opened`; None: run the forward now."""
        if not self._due:
            return None
        limit = opened + min(self._share * self._forward_s, self._cap_s)
        return max((due for due in self._due.values() if now < due <= limit), default=None)
