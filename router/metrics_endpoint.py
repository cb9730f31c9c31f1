"""GET /metrics: the router's metrics in Prometheus' text formats."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry
from starlette.requests import Request
from starlette.responses import Response

from actors.metrics import Counter, Histogram, Recorder


class Exposition(Collector):
    """Exposes a recorder to Prometheus."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """All metrics that have a value."""
        families: dict[str, CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily] = {}
        for metric, labels, series in self._recorder:
            family = families.get(metric.name)
            if isinstance(series, Histogram):
                if family is None:
                    family = HistogramMetricFamily(metric.name, metric.description, labels=metric.labels)
                buckets, below = [], 0
                for bound, count in zip((*metric.buckets, float("inf")), series.counts, strict=True):
                    below += count
                    buckets.append(("+Inf" if bound == float("inf") else str(bound), below))
                assert isinstance(family, HistogramMetricFamily)
                family.add_metric(labels, buckets, series.sum)
            else:
                if family is None:
                    kind = CounterMetricFamily if isinstance(series, Counter) else GaugeMetricFamily
                    family = kind(metric.name, metric.description, labels=metric.labels)
                assert not isinstance(family, HistogramMetricFamily)
                family.add_metric(labels, series.value)
            families[metric.name] = family
        yield from families.values()

    async def respond(self, request: Request) -> Response:
        """Answer GET /metrics in the format of the request's Accept header."""
        try:
            encode, media_type = choose_encoder(request.headers.get("accept", ""))
        except (TypeError, ValueError):  # an invalid version
            encode, media_type = choose_encoder("")
        return Response(encode(self._registry), headers={"Content-Type": media_type})
