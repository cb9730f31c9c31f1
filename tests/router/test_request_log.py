"""The request log: one JSON line per request, without any text of prompts or answers."""

from __future__ import annotations

import asyncio
import json
import logging
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from actors.api.generation import Rejected, Usage
from actors.metrics import Recorder
from router.backend import Unavailable
from router.request_id import ClientId
from router.request_log import RequestRecord
from tests.support.scripted_service import ScriptedBackend, client, config

KEY = "ada-secret-0123456789"
SECRET = "marzipan"  # part of prompts and of some answers
TEXT = {"model": "duo", "prompt": f"Say {SECRET}"}
CHAT = {"model": "duo", "messages": [{"role": "user", "content": f"Say {SECRET}"}], "max_tokens": 9}


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Captures all log records of any level."""
    caplog.set_level(logging.DEBUG)
    return caplog


def lines(log: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The request log so far."""
    messages = [record.getMessage() for record in log.records if record.name == "router.request_log"]
    assert not any("\n" in message for message in messages)
    return [json.loads(message) for message in messages]


def everything(log: pytest.LogCaptureFixture) -> str:
    """All records as they would be written, with arguments and tracebacks."""
    formatter = logging.Formatter("%(name)s %(message)s")
    return "\n".join(f"{formatter.format(record)} {record.__dict__}" for record in log.records)


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "keys"
    path.write_text(f"ada:{KEY}", encoding="utf-8")
    return {"keys": {"file": str(path)}}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_finished_request_is_one_line_with_its_counts(
    stream: bool, keys: dict[str, Any], log: pytest.LogCaptureFixture
) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": "mine-1"}
    body = CHAT | {"stream": stream, "n": 2}
    async with client(ScriptedBackend(thought="So Eve"), config(router=keys)) as http:
        answer = await http.post("/v1/chat/completions", json=body, headers=headers)
    (line,) = lines(log)
    assert datetime.fromisoformat(line.pop("time")).tzinfo is not None
    duration, first_token = line.pop("duration_ms"), line.pop("first_token_ms")
    assert 0 < first_token <= duration < 30_000
    prompt_tokens = line.pop("prompt_tokens")
    assert prompt_tokens > len(SECRET)  # the vocabulary consists mostly of bytes
    if not stream:
        assert prompt_tokens == answer.json()["usage"]["prompt_tokens"]
    assert line == {
        "request_id": "mine-1",
        "key": "ada",
        "method": "POST",
        "path": "/v1/chat/completions",
        "model": "duo",
        "status": 200,
        "error": None,
        "completion_tokens": 12,
        "finish_reasons": ["stop", "stop"],
    }


async def test_error_lines_contain_the_reason(keys: dict[str, Any], log: pytest.LogCaptureFixture) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    router = keys | {"limits": {"requests_per_minute": 3}}
    async with client(ScriptedBackend(), config(router=router)) as http:
        await http.post("/v1/completions", json=TEXT)
        await http.post("/v1/completions", json=TEXT | {"model": SECRET}, headers=headers)
        await http.post("/v1/completions", json=TEXT | {SECRET: 1}, headers=headers)
        await http.get("/v1/models", headers=headers)
        await http.post("/v1/completions", json=TEXT, headers=headers)
    logged = [(line["key"], line["status"], line["error"], line["model"]) for line in lines(log)]
    assert logged == [
        (None, 401, "invalid_request_error", None),
        ("ada", 404, "model_not_found", None),
        ("ada", 400, "unknown_field", None),
        ("ada", 200, None, None),
        ("ada", 429, "rate_limit_exceeded", None),
    ]


async def test_an_error_in_a_stream_is_logged_beside_the_sent_status(log: pytest.LogCaptureFixture) -> None:
    backend = ScriptedBackend()
    backend.fail = Unavailable("its coordinator was lost")
    async with client(backend) as http:
        await http.post("/v1/completions", json=TEXT | {"stream": True})
    (line,) = lines(log)
    assert (line["status"], line["error"], line["completion_tokens"]) == (200, "service_unavailable_error", 1)
    assert line["finish_reasons"] == [None]


async def test_probes_are_not_logged(log: pytest.LogCaptureFixture) -> None:
    async with client(ScriptedBackend()) as http:
        for path in ("/health", "/ready", "/v1/models"):
            await http.get(path)
    assert [line["path"] for line in lines(log)] == ["/v1/models"]


async def every_way(backend: ScriptedBackend, keys: dict[str, Any]) -> None:
    """Sends requests that succeed, fail every check, raise, or time out; all of them contain the secret."""
    headers = {"Authorization": f"Bearer {KEY}"}
    hurried = config(router=keys, deadlines={"request_s": 0.05})
    async with client(backend, config(router=keys)) as http, client(backend, hurried) as hurried_http:

        async def ask(path: str, to: httpx.AsyncClient = http, **request: Any) -> httpx.Response:
            return await to.post(path, headers=headers | request.pop("headers", {}), **request)

        for stream in (False, True):
            for path, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)):
                usual = body | {"stream": stream}
                assert (await ask(path, json=usual | {"guidance": {"explain": True}})).status_code == 200
                backend.rejected = Rejected("overloaded", "full", 1.0)
                assert (await ask(path, json=usual)).status_code == 429
                backend.rejected, backend.fail = None, RuntimeError("unforeseen")
                await ask(path, json=usual)
                backend.fail, backend.error = None, "the cache is full"
                await ask(path, json=usual)
                backend.error, backend.proceed = None, asyncio.Event()
                await ask(path, hurried_http, json=usual)  # ends at the deadline
                backend.proceed = None
        for path, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)):
            wrong: list[dict[str, Any]] = [
                body | {"model": SECRET},
                body | {SECRET: SECRET},
                body | {"stop": 7},
                body | {"tools": [SECRET]},
                body | {"n": SECRET},
                body | {"user": SECRET, "temperature": -1},
                body | {"max_tokens": 10**6},
                {"prompt": SECRET},
                {"model": "duo", "messages": [{"role": SECRET, "content": SECRET}]},
                {"model": "duo", "messages": [{"role": "user", "content": [{"type": "image", "text": SECRET}]}]},
                body | {"chat_template_kwargs": {SECRET: SECRET}},
                body | {"stop": [SECRET], "user": SECRET},
            ]
            for one in wrong:
                await ask(path, json=one)
            await ask(path, content=f'{{"prompt": "{SECRET}"')
            await ask(path, content=b'"' + SECRET.encode() + b"\xff")
            assert (await ask(path, json=body, headers={"Authorization": f"Bearer {SECRET}-of-another"})).status_code


async def test_no_log_record_contains_a_prompt_an_answer_or_a_key(
    keys: dict[str, Any], log: pytest.LogCaptureFixture
) -> None:
    echo = ScriptedBackend(thought=f"So {SECRET}", text=f"It is {SECRET} .")
    await every_way(echo, keys)
    assert len(lines(log)) > 40
    assert {line["status"] for line in lines(log)} >= {200, 400, 401, 404, 429, 500, 504}
    assert SECRET not in everything(log)
    assert KEY not in everything(log)


async def test_log_prompts_logs_prompts_but_no_answers(log: pytest.LogCaptureFixture) -> None:
    async with client(ScriptedBackend(text="an answer"), config(router={"log_prompts": True})) as http:
        await http.post("/v1/completions", json=TEXT)
        await http.post("/v1/chat/completions", json=CHAT)
    assert [line["prompt"] for line in lines(log)] == [{"prompt": TEXT["prompt"]}, {"messages": CHAT["messages"]}]
    assert "an answer" not in everything(log)


def measured(first_s: float | None, last_s: float, tokens: int, queued_s: float = 0.0) -> dict[str, Any] | None:
    """The metrics of an answer whose first and last token came so long after the request."""
    record = RequestRecord(Recorder(), ClientId("r"), "POST", "/v1/completions", began=100.0)
    if first_s is not None:
        record.first_token_s, record.last_token_at = first_s, {"r.0": 100.0 + last_s}
    return record.metrics([Usage(3, tokens, 0, 0, 0, 0, 0.0, queued_s=queued_s)])


def test_metrics_are_times_and_the_speed_of_decoding() -> None:
    assert measured(0.25, 1.25, 11, 0.125) == {
        "time_to_first_token_ms": 250.0,
        "generation_time_ms": 1_000.0,
        "queue_time_ms": 125.0,
        "mean_itl_ms": 100.0,
        "tokens_per_second": 11.0,
    }


@pytest.mark.parametrize(("first_s", "tokens", "known"), [(0.5, 1, [500.0, 0.0]), (None, 0, [None, None])])
def test_an_answer_of_one_token_or_none_has_no_speed(first_s: float | None, tokens: int, known: list[Any]) -> None:
    metrics = measured(first_s, 0.5, tokens)
    assert metrics is not None
    assert [*metrics.values()] == [*known, 0.0, None, None]
