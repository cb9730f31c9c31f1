"""How long a model waits for company before a forward.

Coordinators that were answered together come back at almost the same time, but never at the very same. Taking only
what already waits would run their sessions in turns, each forward half full; waiting for a fixed time would slow a
lone coordinator down. So the model learns how long each coordinator takes from an answer to its next extend, and waits
for one only while it is due within a share of what a forward takes.
"""

from __future__ import annotations

from dataclasses import dataclass

_SMOOTHING = 0.2  # weight of the newest sample in a running mean
_MARGIN = 2.0  # deviations beyond the mean until a coordinator counts as late
_LEAST_DEVIATION_S = 2e-4  # what a timer of an event loop cannot tell apart


@dataclass(slots=True)
class _Habit:
    """One coordinator's time from an answer to its next extend, seconds."""

    answered_at: float | None = None  # None: its extend is here already
    mean: float | None = None
    deviation: float = 0.0

    def learn(self, sample: float) -> None:
        if self.mean is None:
            self.mean, self.deviation = sample, sample / 2
            return
        self.deviation += _SMOOTHING * (abs(sample - self.mean) - self.deviation)
        self.mean += _SMOOTHING * (sample - self.mean)

    def due(self) -> float | None:
        """When its next extend should have come, or None if none is expected."""
        if self.answered_at is None or self.mean is None:
            return None
        return self.answered_at + self.mean + _MARGIN * max(self.deviation, _LEAST_DEVIATION_S)


class GatherWindow:
    """share: of a forward's usual duration, the longest wait. cap_s: the longest wait, seconds. 0 never waits."""

    def __init__(self, share: float = 0.5, cap_s: float = 0.01) -> None:
        self._share, self._cap_s = share, cap_s
        self._habits: dict[object, _Habit] = {}
        self._forward_s = 0.0

    @property
    def forward_s(self) -> float:
        """Running mean of a forward's duration, seconds."""
        return self._forward_s

    def arrived(self, peer: object, now: float) -> None:
        """An extend of this coordinator came."""
        habit = self._habits.setdefault(peer, _Habit())
        if habit.answered_at is not None:
            habit.learn(now - habit.answered_at)
            habit.answered_at = None

    def answered(self, peer: object, now: float) -> None:
        """Rows went out to this coordinator, so its next extend is expected."""
        self._habits.setdefault(peer, _Habit()).answered_at = now

    def forget(self, peer: object) -> None:
        """The coordinator is gone, or has no session here."""
        self._habits.pop(peer, None)

    def forward_took(self, seconds: float) -> None:
        weight = _SMOOTHING if self._forward_s else 1.0
        self._forward_s += weight * (seconds - self._forward_s)

    def wait_until(self, opened: float, now: float) -> float | None:
        """Until when to wait for company in a window that opened at `opened`; None: run the forward now."""
        limit = opened + min(self._share * self._forward_s, self._cap_s)
        dues = (habit.due() for habit in self._habits.values())
        return max((due for due in dues if due is not None and now < due <= limit), default=None)
