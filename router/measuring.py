"""What the router measures of its requests, and how it shows that: time to tokens, tokens, requests by status."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from typing import cast

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.metrics import Counter, Histogram, Recorder
from actors.requests import Delta, Event, Generate
from router.backend import Backend, Status
from router.records import LEFT

MEASURED = "/v1/"  # requests for addresses below it are counted; probes are not


class Measurements:
    """One request: who asked for which model, and since when. The router fills in what it learns.

    model: a served name, or "" while it is not known. key: the name of the API key, or "". status: None until the
    response begins; what goes wrong later replaces it.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._began = time.monotonic()
        self._prompt_tokens = 0  # not counted yet
        self.model = self.key = ""
        self.status: int | None = None

    def end(self) -> None:
        """The request is over: count it."""
        status = LEFT if self.status is None else self.status
        self._recorder.counter("thinklogit_requests", self.model, self.key, str(status)).add()

    def watch(self, backend: Backend, prompt_tokens: int) -> Backend:
        """The same backend, with what it says measured. prompt_tokens: of the request, counted with its first token."""
        self._prompt_tokens = prompt_tokens
        return _Watched(self, backend)

    def first_token(self, now: float) -> None:
        """A choice has its first token."""
        self._recorder.histogram("thinklogit_first_token_seconds", self.model).observe(now - self._began)
        if self._prompt_tokens:
            self._recorder.counter("thinklogit_prompt_tokens", self.model, self.key).add(self._prompt_tokens)
            self._prompt_tokens = 0

    def series(self) -> tuple[Counter, Histogram]:
        """Where tokens, and the seconds between them, are counted."""
        tokens = self._recorder.counter("thinklogit_completion_tokens", self.model, self.key)
        return tokens, self._recorder.histogram("thinklogit_inter_token_seconds", self.model)


class _Watched:
    """A backend as one request sees it."""

    def __init__(self, measurements: Measurements, backend: Backend) -> None:
        self._measurements, self._backend = measurements, backend

    async def generate(self, request: Generate) -> AsyncIterator[Event]:
        """See router.backend.Backend.generate."""
        tokens, between = self._measurements.series()
        heard_at: float | None = None
        async with aclosing(cast("AsyncGenerator[Event, None]", self._backend.generate(request))) as events:
            async for event in events:
                if isinstance(event, Delta) and event.tokens:
                    now = time.monotonic()
                    tokens.add(len(event.tokens))
                    if heard_at is None:
                        self._measurements.first_token(now)
                    else:
                        between.observe((now - heard_at) / len(event.tokens))
                    heard_at = now
                yield event

    async def status(self) -> Status:
        """See router.backend.Backend.status."""
        return await self._backend.status()


class Measuring:
    """Counts every request by the status that it ends with; `measurements` in its scope are for whoever answers it."""

    def __init__(self, app: ASGIApp, recorder: Recorder) -> None:
        self.app, self._recorder = app, recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        measurements = scope["measurements"] = Measurements(self._recorder)

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                measurements.status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except Exception:
            measurements.status = 500
            raise
        finally:
            if MEASURED in scope["path"]:
                measurements.end()


class Exposition(Collector):
    """A recorder in Prometheus' words."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Every metric that has a value."""
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

    async def answer(self, request: Request) -> Response:
        """The response to GET /metrics, as text of the version that is asked for."""
        try:
            encode, media_type = choose_encoder(request.headers.get("accept", ""))
        except (TypeError, ValueError):  # a version that is none
            encode, media_type = choose_encoder("")
        return Response(encode(self._registry), headers={"Content-Type": media_type})
