"""Metrics of requests, token times and token counts, and their text at /metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as parsed

from actors.api.generation import CoordinatorEvent, Delta, Event, Finished, Generate, Moved, Rejected, Resume, Tally
from actors.config import KeysConfig
from actors.metrics import METRICS, Recorder
from router.api import create_app
from router.backend import ApiError, Status, Unavailable
from router.failover import FailoverBackend
from router.metrics_endpoint import Exposition
from router.request_id import ClientId
from router.request_log import RequestLog
from tests.support.deadlines import HANG_S
from tests.support.scripted_service import ScriptedBackend, config, tokenizers, usage

CHAT = {"model": "duo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}
STREAM = CHAT | {"stream": True}
SCOPE = {"type": "http", "method": "GET", "path": "/v1/models", "request_id": ClientId("r"), "headers": []}
Samples = dict[tuple[str, tuple[str, ...]], float]


def service(backend: Any, recorder: Recorder) -> httpx.AsyncClient:
    app = create_app(config(), tokenizers(), backend, recorder)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service")


def samples(text: str) -> Samples:
    """All samples except buckets, by name and by the values of the labels model, key and status."""
    return {
        (sample.name, tuple(sample.labels[name] for name in ("model", "key", "status") if name in sample.labels)): (
            sample.value
        )
        for family in parsed(text)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


async def scraped(backend: ScriptedBackend, *bodies: Any) -> Samples:
    """The samples at /metrics after these requests."""
    async with service(backend, Recorder()) as http:
        for body in bodies:
            await http.post("/v1/chat/completions", json=body)
        return samples((await http.get("/metrics")).text)


def statuses(seen: Samples) -> dict[tuple[str, ...], float]:
    return {labels: value for (name, labels), value in seen.items() if name == "thinklogit_requests_total"}


@pytest.mark.parametrize("body", [CHAT, STREAM])
async def test_an_answer_is_counted_with_its_tokens_and_times(body: dict[str, Any]) -> None:
    seen = await scraped(ScriptedBackend(thought="So Eve"), body, body | {"n": 2})
    assert statuses(seen) == {("duo", "", "200"): 2}
    assert seen["thinklogit_completion_tokens_total", ("duo", "")] == 3 * 6
    assert seen["thinklogit_first_token_seconds_count", ("duo",)] == 3
    assert seen["thinklogit_inter_token_seconds_count", ("duo",)] == 3 * 5


async def test_a_prompt_counts_once_for_all_its_choices() -> None:
    async with service(ScriptedBackend(), Recorder()) as http:
        answer = (await http.post("/v1/chat/completions", json=CHAT | {"n": 3})).json()
        seen = samples((await http.get("/metrics")).text)
    assert seen["thinklogit_prompt_tokens_total", ("duo", "")] == answer["usage"]["prompt_tokens"] > 0


class Slow(ScriptedBackend):
    """Waits before its first token."""

    async def generate(self, request: Generate) -> AsyncIterator[Event]:
        await asyncio.sleep(0.2)
        async for event in super().generate(request):
            yield event


@pytest.mark.parametrize("body", [CHAT, STREAM])
async def test_first_token_time_and_inter_token_time_are_separate(body: dict[str, Any]) -> None:
    recorder = Recorder()
    async with service(Slow(), recorder) as http:
        await http.post("/v1/chat/completions", json=body)
    first = recorder.histogram("thinklogit_first_token_seconds", "duo")
    between = recorder.histogram("thinklogit_inter_token_seconds", "duo")
    assert between.sum < 0.2 <= first.sum


async def test_tokens_of_one_message_share_its_time() -> None:
    class Busy(ScriptedBackend):
        async def generate(self, request: Generate) -> AsyncIterator[Event]:
            yield Delta(content="It", tokens=[1])
            await asyncio.sleep(0.1)
            yield Delta(content=" is Eve", tokens=[2, 3, 4, 5])
            yield Finished("stop", usage(request, 5))

    recorder = Recorder()
    async with service(Busy(), recorder) as http:
        await http.post("/v1/chat/completions", json=CHAT)
    assert 0.1 / 4 <= recorder.histogram("thinklogit_inter_token_seconds", "duo").sum < 0.1


@pytest.mark.parametrize(
    ("body", "labels"),
    [
        (CHAT | {"model": "unheard-of"}, ("", "", "404")),
        (CHAT | {"temperature": -1.0}, ("duo", "", "400")),
        ({}, ("", "", "400")),
    ],
)
async def test_an_error_is_labelled_with_served_models_only(body: dict[str, Any], labels: tuple[str, ...]) -> None:
    assert statuses(await scraped(ScriptedBackend(), body)) == {labels: 1}


async def test_a_full_service_counts_as_429() -> None:
    backend = ScriptedBackend()
    backend.rejected = Rejected("overloaded", "later", 2.0)
    seen = await scraped(backend, CHAT, STREAM)
    assert statuses(seen) == {("duo", "", "429"): 2}
    assert not any(name.startswith("thinklogit_prompt_tokens") for name, _ in seen)


async def test_a_failing_stream_counts_with_its_errors_status() -> None:
    backend = ScriptedBackend()
    backend.fail = Unavailable("gone")
    assert statuses(await scraped(backend, STREAM)) == {("duo", "", "503"): 1}
    backend.fail = ApiError("broken")
    assert statuses(await scraped(backend, STREAM, CHAT)) == {("duo", "", "500"): 2}


async def test_a_client_disconnect_counts_as_499() -> None:
    backend, recorder = ScriptedBackend(), Recorder()
    backend.proceed = asyncio.Event()
    app = create_app(config(), tokenizers(), backend, recorder)
    left = asyncio.Event()
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if not sent:
            sent.append({})
            return {"type": "http.request", "body": httpx.Request("POST", "http://x", json=STREAM).content}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        left.set()

    path = "/v1/chat/completions"
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
    async with asyncio.timeout(HANG_S):
        await app(scope, receive, send)
    assert [labels for metric, labels, _ in recorder if metric.name == "thinklogit_requests"] == [("duo", "", "499")]


async def test_an_exception_counts_as_500() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("a fault")

    recorder = Recorder()
    with pytest.raises(RuntimeError):
        await RequestLog(broken, KeysConfig(), recorder)(dict(SCOPE), None, None)  # type: ignore[arg-type]
    assert recorder.counter("thinklogit_requests", "", "", "500").value == 1


async def test_probes_scrapes_and_preflights_are_not_counted() -> None:
    async with service(ScriptedBackend(), Recorder()) as http:
        await http.options("/v1/chat/completions")
        for path in ("/health", "/ready", "/metrics", "/metrics", "/nothing"):
            await http.get(path)
        assert statuses(samples((await http.get("/metrics")).text)) == {}


async def test_the_name_of_a_key_is_a_label() -> None:
    async def answers(scope: Any, receive: Any, send: Any) -> None:
        scope["record"].key = "alice"
        await send({"type": "http.response.start", "status": 401})

    async def send(message: Any) -> None:
        pass

    recorder = Recorder()
    await RequestLog(answers, KeysConfig(), recorder)(dict(SCOPE), None, send)  # type: ignore[arg-type]
    assert recorder.counter("thinklogit_requests", "", "alice", "401").value == 1


def full_recorder() -> Recorder:
    """A recorder with a value in every metric, labelled by letters."""
    recorder = Recorder()
    for name, metric in METRICS.items():
        for word in ("a", 'b"\n'):
            labels = [word] * len(metric.labels)
            if metric.kind == "histogram":
                recorder.histogram(name, *labels).observe(0.02, times=3)
                recorder.histogram(name, *labels).observe(1e6)
            elif metric.kind == "gauge":
                recorder.gauge(name, *labels).value = 0.5
            else:
                recorder.counter(name, *labels).add(2)
    return recorder


@pytest.mark.parametrize(
    ("accept", "parse", "kind"),
    [
        ("text/plain", parsed, "text/plain"),
        ("application/openmetrics-text; version=1.0.0", openmetrics, "application/openmetrics-text"),
    ],
)
async def test_prometheus_parses_every_metric(accept: str, parse: Any, kind: str) -> None:
    async with service(ScriptedBackend(), full_recorder()) as http:
        response = await http.get("/metrics", headers={"Accept": accept})
    assert response.headers["content-type"].startswith(kind)
    families = {family.name: family for family in parse(response.text)}
    assert {name.removesuffix("_total") for name in families} == set(METRICS)
    for name, metric in METRICS.items():
        family = families.get(name) or families[f"{name}_total"]
        assert (family.type, family.documentation) == (metric.kind, metric.description)
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels)
            assert set(sample.labels.values()) <= {"a", 'b"\n'} or "le" in sample.labels


def test_histogram_buckets_are_cumulative() -> None:
    (family,) = (f for f in Exposition(full_recorder()).collect() if f.name == "thinklogit_first_token_seconds")
    buckets = [s.value for s in family.samples if s.name.endswith("_bucket") and s.labels["model"] == "a"]
    assert buckets == [0, *[3] * (len(METRICS[family.name].buckets) - 1), 4]
    assert [s.value for s in family.samples if s.name.endswith("_sum")] == [pytest.approx(1e6 + 0.06)] * 2


class CoordinatorsThatHandOver:
    """Coordinators; the first one hands over after one token."""

    def __init__(self) -> None:
        self.requests: list[Resume | None] = []

    async def generate(self, request: Generate) -> AsyncIterator[CoordinatorEvent]:
        self.requests.append(request.resume)
        if request.resume is None:
            yield Delta(content="It", tokens=[1], choices=[1], tally=Tally())
            yield Moved()
        else:
            yield Delta(content=" is", tokens=[2], choices=[2], tally=Tally())
            yield Finished("stop", usage(request, 2))

    async def status(self) -> Status:
        return Status()

    async def ending(self) -> bool:
        return False


async def test_a_failover_counts_as_one_resume() -> None:
    recorder = Recorder()
    async with service(FailoverBackend(CoordinatorsThatHandOver(), config().deadlines, recorder), recorder) as http:
        answer = (await http.post("/v1/chat/completions", json=CHAT)).json()
        seen = samples((await http.get("/metrics")).text)
    assert answer["choices"][0]["message"]["content"] == "It is"
    assert seen["thinklogit_resumes_total", ()] == 1
    assert seen["thinklogit_first_token_seconds_count", ("duo",)] == 1
    assert statuses(seen) == {("duo", "", "200"): 1}
