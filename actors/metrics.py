"""The table of all metrics, and the registry (`Recorder`) in which each process counts.

Components count once per turn, forward or message rather than once per token, where that is possible. Deployments
publish their recorder through Ray (`actors.serve.ray_metrics`); the router also serves its own at /metrics.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

Kind = Literal["counter", "gauge", "histogram"]

COMMON = ("application", "replica")  # labels of every metric published through Ray

TOKEN_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
WAITS_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. buckets: ascending upper bounds of a histogram's buckets; one more bucket is above the last."""

    name: str
    kind: Kind
    description: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS = {
    metric.name: metric
    for metric in (
        # Requests. model: a served name, or "" if the request names none; key: the name of an API key, or "".
        Metric("thinklogit_requests", "counter", "Requests that ended, by HTTP status", ("model", "key", "status")),
        Metric("thinklogit_prompt_tokens", "counter", "Prompt tokens of requests that got a token", ("model", "key")),
        Metric("thinklogit_completion_tokens", "counter", "Tokens sent to clients", ("model", "key")),
        Metric(
            "thinklogit_first_token_seconds",
            "histogram",
            "Seconds from a request's arrival to the first token of a choice",
            ("model",),
            WAITS_S,
        ),
        Metric(
            "thinklogit_inter_token_seconds",
            "histogram",
            "Seconds per further token: for each message, the time since the one before divided by its tokens",
            ("model",),
            TOKEN_S,
        ),
        # Decoding. role: a model role, or "coordinator". Frequent events have a sum and a count, the cheapest form.
        Metric(
            "thinklogit_steps",
            "counter",
            "Forwards (prefill, extend, draft), answered frames of lookups, and turns of coordinators",
            ("role", "phase"),
        ),
        Metric("thinklogit_step_seconds", "counter", "Seconds that these steps took", ("role", "phase")),
        Metric(
            "thinklogit_batched_sessions",
            "counter",
            "Sessions in forwards, summed over them",
            ("role", "phase"),
        ),
        Metric("thinklogit_forward_tokens", "counter", "Tokens that went through a model", ("role",)),
        Metric("thinklogit_decided_tokens", "counter", "Tokens that coordinators chose"),
        Metric("thinklogit_guided_rows", "counter", "Rows decided under guidance"),
        Metric("thinklogit_uncovered_mass", "counter", "Probability outside the candidates, summed over guided rows"),
        Metric("thinklogit_widened_rows", "counter", "Rows for which a wider top-k was requested"),
        Metric("thinklogit_audited_rows", "counter", "Guided rows that were compared with the full rows"),
        Metric("thinklogit_audits_differing", "counter", "Audited rows for which the slices gave another token"),
        Metric("thinklogit_drafted_tokens", "counter", "Drafted tokens that were verified"),
        Metric("thinklogit_accepted_tokens", "counter", "Drafted tokens that were accepted"),
        Metric("thinklogit_hidden_drafts", "counter", "Drafted tokens that were drafted while others were verified"),
        # Capacity.
        Metric(
            "thinklogit_sessions",
            "gauge",
            "Sessions of a coordinator: running, parked (started, waiting for cache) or waiting (not started)",
            ("state",),
        ),
        Metric("thinklogit_cache_used_ratio", "gauge", "Used share of a model's KV cache, 0 to 1", ("role",)),
        Metric("thinklogit_cache_tokens", "gauge", "Tokens that a model's KV cache holds", ("role",)),
        Metric("thinklogit_extends_waiting", "gauge", "Extends that are queued or running at a model", ("role",)),
        # Faults. None of them changes a token of an answer.
        Metric("thinklogit_reprefills", "counter", "Lost caches of sessions, whose tokens were sent again", ("role",)),
        Metric("thinklogit_resent_tokens", "counter", "Tokens that were sent again for these", ("role",)),
        Metric("thinklogit_resumes", "counter", "Answers that another coordinator continued"),
        Metric("thinklogit_refusals", "counter", "Items that models refused, by reason", ("role", "reason")),
        Metric("thinklogit_failed_forwards", "counter", "Forwards that raised an error", ("role",)),
    )
}


class Counter:
    """A total that never decreases."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, amount: float = 1.0) -> None:
        """Add `amount`."""
        self.value += amount


class Gauge:
    """A current value."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0


class Histogram:
    """Counts of values by bucket, and the sum of all values. A value on a bound belongs to the bucket below it."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Add a value that occurred `times` times."""
        self.counts[bisect_left(self._bounds, value)] += times
        self.sum += value * times


Series = Counter | Gauge | Histogram
S = TypeVar("S", Counter, Gauge, Histogram)


class Recorder:
    """The registry of one process: every counter, gauge and histogram is kept here and nowhere else.

    The first request for a series creates it. Code that counts often keeps the object that it got.
    """

    def __init__(self) -> None:
        self._series: dict[tuple[str, ...], Series] = {}  # by the metric's name and the values of its labels

    def counter(self, name: str, *labels: str) -> Counter:
        """The counter of that name and these values of its labels, in the table's order."""
        return self._find(Counter, name, labels)

    def gauge(self, name: str, *labels: str) -> Gauge:
        """The gauge of that name and these values of its labels."""
        return self._find(Gauge, name, labels)

    def histogram(self, name: str, *labels: str) -> Histogram:
        """The histogram of that name and these values of its labels."""
        return self._find(Histogram, name, labels)

    def __iter__(self) -> Iterator[tuple[Metric, tuple[str, ...], Series]]:
        """All series: the metric, the values of its labels, and the counter, gauge or histogram."""
        for (name, *labels), series in self._series.items():
            yield METRICS[name], tuple(labels), series

    def _find(self, kind: type[S], name: str, labels: tuple[str, ...]) -> S:
        series = self._series.get((name, *labels))
        if series is None:
            series = self._series[name, *labels] = _new(METRICS[name], labels)
        assert isinstance(series, kind), f"{name} is a {METRICS[name].kind}"
        return series


def _new(metric: Metric, labels: tuple[str, ...]) -> Series:
    assert len(labels) == len(metric.labels), f"{metric.name} has the labels {metric.labels}"
    if metric.kind == "histogram":
        return Histogram(metric.buckets)
    return Counter() if metric.kind == "counter" else Gauge()
