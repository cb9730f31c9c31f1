"""Access control over HTTP: API keys, their limits, and CORS."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from actors.config import ConfigError, ServiceConfig
from router.request_planning import client_id
from tests.support.deadlines import HANG_S
from tests.support.scripted_service import ScriptedBackend, client, config

ADA, ADAS_OTHER, EVE = "ada-secret-0123456789", "ada-secret-9876543210", "eve-secret-0123456789"
TEXT = {"model": "duo", "prompt": "Hi"}
CHAT = {"model": "duo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}
OPEN = ("/", "/playground/app.js", "/openapi.json", "/health", "/ready", "/version", "/metrics")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"ada:{ADA} ada:{ADAS_OTHER}\neve:{EVE}\n", encoding="utf-8")
    return path


def guarded(file: Path, **router: Any) -> ServiceConfig:
    return config(router={"keys": {"file": str(file)}, **router})


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def openais(response: httpx.Response) -> dict[str, Any]:
    """The error in a response, which must have OpenAI's form."""
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["request_id"] == response.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/duo"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/health/"),
        ("GET", "//health"),
        ("GET", "/playground"),
        ("GET", "/whatever"),
        ("OPTIONS", "/v1/models"),
    ],
)
async def test_without_a_key_only_open_addresses_answer(method: str, path: str, file: Path) -> None:
    backend = ScriptedBackend()
    async with client(backend, guarded(file)) as http:
        for headers in ({}, bearer("wrong-key-0123456789")):
            response = await http.request(method, f"http://service{path}", json=TEXT, headers=headers)
            assert response.status_code == 401
            assert response.headers["WWW-Authenticate"] == "Bearer"
            assert openais(response)["type"] == "invalid_request_error"
    assert backend.requests == []


async def test_probes_need_no_key_unless_they_are_closed(file: Path) -> None:
    async with client(ScriptedBackend(), guarded(file)) as http:
        for path in OPEN:
            assert (await http.get(path)).status_code != 401, path
        assert (await http.get("/health")).status_code == 200
    closed = config(router={"keys": {"file": str(file), "open_paths": ["/health"]}})
    async with client(ScriptedBackend(), closed) as http:
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/ready")).status_code == 401
        assert (await http.get("/ready", headers=bearer(ADA))).status_code == 200


async def test_a_key_changes_no_answer(file: Path) -> None:
    async with client(ScriptedBackend(), guarded(file)) as http, client(ScriptedBackend()) as open_http:
        for path, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)):
            for stream in (False, True):
                request = {**body, "stream": stream, "seed": 1}
                headers = {"X-Request-Id": "mine"}
                answer = await http.post(path, json=request, headers=headers | bearer(ADA))
                usual = await open_http.post(path, json=request, headers=headers)
                assert (answer.status_code, usual.status_code) == (200, 200)
                assert answer.headers["X-Request-Id"] == "mine"
                assert len(answer.text) == len(usual.text)


async def test_without_configured_keys_any_key_or_none_is_accepted() -> None:
    async with client(ScriptedBackend()) as http:
        for headers in ({}, bearer("none")):
            assert (await http.post("/v1/completions", json=TEXT, headers=headers)).status_code == 200


async def test_the_official_client_recognises_an_unknown_key(file: Path) -> None:
    http: Any = client(ScriptedBackend(), guarded(file))
    async with openai.AsyncOpenAI(api_key="none", base_url="http://service/v1", http_client=http) as api:
        with pytest.raises(openai.AuthenticationError, match="not known here") as raised:
            await api.completions.create(model="duo", prompt="Hi")
        assert raised.value.code == "invalid_api_key"
        answer = await api.with_options(api_key=EVE).completions.create(model="duo", prompt="Hi")
        assert answer.choices[0].text == "It is Eve ."


async def test_clients_take_turns_by_the_name_of_their_key(file: Path) -> None:
    backend = ScriptedBackend()
    async with client(backend, guarded(file)) as http:
        for key in (ADA, ADAS_OTHER, EVE):
            await http.post("/v1/completions", json=TEXT | {"user": "x"}, headers=bearer(key))
    assert [one.client for one in backend.requests] == [client_id(name, None, None) for name in ("ada", "ada", "eve")]


async def test_a_key_over_its_rate_gets_429_with_retry_after(file: Path) -> None:
    async with client(ScriptedBackend(), guarded(file, limits={"requests_per_minute": 2})) as http:
        answers = [await http.post("/v1/completions", json=TEXT, headers=bearer(ADA)) for _ in range(3)]
        other = await http.post("/v1/completions", json=TEXT, headers=bearer(EVE))
        probe = await http.get("/health", headers=bearer(ADA))
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    error = openais(answers[2])
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert 1 <= int(answers[2].headers["Retry-After"]) <= 30
    assert (other.status_code, probe.status_code) == (200, 200)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_keys_open_requests_are_bounded_until_they_end(stream: bool, file: Path) -> None:
    backend = ScriptedBackend()
    backend.proceed = asyncio.Event()
    body = TEXT | {"stream": stream}
    async with client(backend, guarded(file, limits={"open_requests": 2})) as http:

        async def ask(key: str = ADA) -> int:
            return (await http.post("/v1/completions", json=body, headers=bearer(key))).status_code

        running = [asyncio.create_task(ask()) for _ in range(2)]
        for _ in range(2):
            await asyncio.wait_for(backend.began.acquire(), HANG_S)
        assert await ask() == 429
        running.append(asyncio.create_task(ask(EVE)))
        await asyncio.wait_for(backend.began.acquire(), HANG_S)
        running[0].cancel()
        await asyncio.wait(running[:1])
        running[0] = asyncio.create_task(ask())
        await asyncio.wait_for(backend.began.acquire(), HANG_S)
        backend.proceed.set()
        assert await asyncio.gather(*running) == [200] * 3
        assert await ask() == 200


async def test_limits_require_keys() -> None:
    with pytest.raises(ConfigError, match=r"router: limits are counted for each key"):
        config(router={"limits": {"open_requests": 1}})


def test_a_missing_key_file_prevents_the_start(file: Path) -> None:
    file.unlink()
    with pytest.raises(ConfigError, match=r"router\.keys\.file"):
        client(ScriptedBackend(), guarded(file))


@pytest.mark.parametrize(
    ("path", "body", "comes_to"),
    [
        ("/v1/completions", TEXT | {"max_tokens": 60, "n": 2}, 124),
        ("/v1/completions", TEXT | {"prompt": [[1] * 90, [1] * 8], "max_tokens": 2}, 102),
    ],
)
async def test_a_request_of_too_many_tokens_is_refused_with_its_size(
    path: str, body: dict[str, Any], comes_to: int
) -> None:
    async with client(ScriptedBackend(), config(router={"max_request_tokens": 100})) as http:
        response = await http.post(path, json=body)
        fits = await http.post(path, json=TEXT | {"max_tokens": 90})
    assert response.status_code == 413
    assert f"may come to {comes_to} tokens, and the service takes 100" in openais(response)["message"]
    assert fits.status_code == 200


def preflight(origin: str) -> dict[str, str]:
    headers = "authorization,content-type,x-stainless-lang"
    return {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": headers,
    }


async def test_only_named_origins_may_read_responses(file: Path) -> None:
    for origins, allowed in (([], []), (["https://a.example"], ["https://a.example"]), (["*"], ["*", "*"])):
        async with client(ScriptedBackend(), guarded(file, cors_origins=origins)) as http:
            seen = await _origins_allowed(http, ["https://a.example", "https://b.example"])
        assert seen == allowed


async def _origins_allowed(http: httpx.AsyncClient, origins: Sequence[str]) -> list[str]:
    """The origins that responses allow. Where answers are readable, errors must be, too."""
    allowed = []
    for origin in origins:
        first = await http.options("/v1/chat/completions", headers=preflight(origin))
        header = first.headers.get("access-control-allow-origin")
        for key, status in ((ADA, 200), ("wrong-key-0123456789", 401)):
            answer = await http.post("/v1/chat/completions", json=CHAT, headers=bearer(key) | {"Origin": origin})
            assert answer.status_code == status
            assert answer.headers.get("access-control-allow-origin") == header
        if header is not None:
            assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
            assert first.status_code == 200
            assert "authorization" in first.headers["access-control-allow-headers"].lower()
            allowed.append(header)
    return allowed


async def test_a_mounted_service_knows_its_open_addresses(file: Path) -> None:
    http = client(ScriptedBackend(), guarded(file))
    transport = http._transport
    assert isinstance(transport, httpx.ASGITransport)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(transport.app, root_path="/llm"), base_url="http://service"
    ) as mounted:
        assert (await mounted.get("/llm/health")).status_code == 200
        assert (await mounted.get("/llm/v1/models")).status_code == 401
        models = await mounted.get("/llm/v1/models", headers=bearer(ADA))
    assert json.loads(models.text)["object"] == "list"
    await http.aclose()
