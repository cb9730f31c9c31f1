"""Publishes the metrics of a process through Ray, whose agent on each node serves them to Prometheus."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from ray import serve
from ray.util import metrics as ray_metrics

from actors.metrics import COMMON, Gauge, Histogram, Metric, Recorder

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
BATCH = 64  # values of a histogram that are published without a pause

Labels = tuple[str, ...]


class Exporter:
    """Publishes the changes of a recorder to Ray. application, replica: the values of the labels in `COMMON`."""

    def __init__(self, application: str, replica: str) -> None:
        self._common = dict(zip(COMMON, (application, replica), strict=True))
        self._ray_metrics: dict[str, Any] = {}  # Ray's objects by name
        self._totals: dict[tuple[str, Labels], float] = {}  # what was published of each counter
        self._buckets: dict[tuple[str, Labels], list[int]] = {}  # and of each histogram

    async def publish(self, recorder: Recorder) -> None:
        """Publish all changes. Yields to other tasks often, since publishing one value takes 3 microseconds."""
        for metric, labels, series in list(recorder):
            tags = dict(zip(metric.labels, labels, strict=True))
            if isinstance(series, Histogram):
                await self._observe(metric, labels, series, tags)
            elif isinstance(series, Gauge):
                self._ray_metric(metric).set(series.value, tags)
            else:
                new = series.value - self._totals.get((metric.name, labels), 0.0)
                self._totals[metric.name, labels] = series.value
                if new > 0:
                    self._ray_metric(metric).inc(new, tags)
            await asyncio.sleep(0)

    async def _observe(self, metric: Metric, labels: Labels, series: Histogram, tags: dict[str, str]) -> None:
        """Publish new values of a histogram as their buckets' bounds. Ray's agent keeps only the bucket of a value."""
        before = self._buckets.get((metric.name, labels), [0] * len(series.counts))
        counts = self._buckets[metric.name, labels] = list(series.counts)
        ray_metric = self._ray_metric(metric)
        for bound, count, published in zip((*metric.buckets, 2 * metric.buckets[-1]), counts, before, strict=True):
            for number in range(count - published):
                ray_metric.observe(bound, tags)
                if number % BATCH == BATCH - 1:
                    await asyncio.sleep(0)

    def _ray_metric(self, metric: Metric) -> Any:
        """Ray's object for a metric."""
        if metric.name not in self._ray_metrics:
            labels = (*COMMON, *metric.labels)
            if metric.kind == "histogram":
                ray_metric = ray_metrics.Histogram(metric.name, metric.description, list(metric.buckets), labels)
            elif metric.kind == "gauge":
                ray_metric = ray_metrics.Gauge(metric.name, metric.description, labels)
            else:
                ray_metric = ray_metrics.Counter(metric.name, metric.description, labels)
            self._ray_metrics[metric.name] = ray_metric.set_default_tags(self._common)
        return self._ray_metrics[metric.name]


async def keep_exporting(measure: Callable[[], Recorder]) -> None:
    """Publish the recorder that `measure` returns, once a second, from a replica of Serve. Errors are only logged."""
    this = serve.get_replica_context()
    exporter = Exporter(this.app_name, this.replica_tag)
    while True:
        await asyncio.sleep(INTERVAL_S)
        try:
            await exporter.publish(measure())
        except Exception:
            log.exception("the metrics were not published")
