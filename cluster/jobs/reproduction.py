"""Compares the gain of a run with the gain that its configuration expects."""

from __future__ import annotations

from cluster.jobs.config import Expectation
from cluster.jobs.statistics import Interval
from cluster.jobs.summary import Score, Summary, Variant
from cluster.jobs.tables import SURE


def helps(score: Score) -> bool:
    """True if a guided variant is significantly better than the target."""
    return score.difference is not None and score.difference.low > 0 and score.p is not None and score.p < SURE


def reproduced(expected: Expectation, summary: Summary) -> tuple[bool, str]:
    """(True if the expected setting significantly gains what it should, a sentence with the reason)."""
    low, high = expected.gain
    range_ = f"expected {low:+.0%} to {high:+.0%} ({expected.source})"
    score = summary.score(Variant("guided", expected.setting))
    if score is None or score.gain is None:
        return False, f"not reproduced: {expected.setting} cannot be compared with the target; {range_}"
    inside, sure = low <= score.gain.value <= high, helps(score)
    word = "reproduced" if inside and sure else "not reproduced"
    doubt = "" if sure else ", which may be chance"
    return inside and sure, f"{word}: {expected.setting} gains {percent(score.gain)} over the target{doubt}; {range_}"


def points(interval: Interval) -> str:
    """A difference of accuracies as text: +12.3 [+4.5, +20.1] points."""
    return f"{100 * interval.value:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}] points"


def percent(interval: Interval) -> str:
    """A relative gain as text: +12.3% [+4.5%, +20.1%]."""
    return f"{interval.value:+.1%} [{interval.low:+.1%}, {interval.high:+.1%}]"
