"""Whether a run shows the gain that its configuration expects."""

from __future__ import annotations

from cluster.jobs.config import Expectation
from cluster.jobs.statistics import Interval
from cluster.jobs.summary import Score, Summary, Variant
from cluster.jobs.tables import SURE


def helps(score: Score) -> bool:
    """Whether a guided variant is better than the target by more than chance does."""
    return score.difference is not None and score.difference.low > 0 and score.p is not None and score.p < SURE


def reproduced(expected: Expectation, summary: Summary) -> tuple[bool, str]:
    """Whether the expected setting gains what it should, surely; and the sentence that says so, or why not."""
    low, high = expected.gain
    range_ = f"expected {low:+.0%} to {high:+.0%} ({expected.source})"
    score = summary.score(Variant("guided", expected.setting))
    if score is None or score.gain is None:
        return False, f"not: {expected.setting} cannot be held against the target; {range_}"
    inside, sure = low <= score.gain.value <= high, helps(score)
    word = "reproduced" if inside and sure else "not"
    doubt = "" if sure else ", which chance alone may do"
    return inside and sure, f"{word}: {expected.setting} gains {percent(score.gain)} over the target{doubt}; {range_}"


def points(interval: Interval) -> str:
    """Of a difference of accuracies, as +12.3 [+4.5, +20.1] points."""
    return f"{100 * interval.value:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}] points"


def percent(interval: Interval) -> str:
    """Of a relative gain, as +12.3% [+4.5%, +20.1%]."""
    return f"{interval.value:+.1%} [{interval.low:+.1%}, {interval.high:+.1%}]"
