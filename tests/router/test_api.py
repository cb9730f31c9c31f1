import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from actors.api.generation import Event, Generate, Rejected
from actors.config import ServiceConfig
from router.api import create_app
from router.backend import Status
from tests.support.deadlines import HANG_S
from tests.support.scripted_service import ScriptedBackend, client, config, tokenizers

CHAT = {"model": "duo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}
TEXT = {"model": "duo", "prompt": "Hi"}
JSON = {"Content-Type": "application/json"}


async def post(backend: ScriptedBackend, path: str, body: Any, service: Any = None, **more: Any) -> httpx.Response:
    async with client(backend, service) as http:
        return await http.post(path, json=body, **more)


async def chat(backend: ScriptedBackend, **more: Any) -> httpx.Response:
    return await post(backend, "/v1/chat/completions", CHAT | more)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = response.text.strip().split("\n\n")
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


async def test_a_chat_answer_separates_thinking_and_content() -> None:
    response = await chat(ScriptedBackend(thought="So Eve", text="It is Eve ."), n=2, seed=5)
    body = response.json()
    assert [choice["message"]["content"] for choice in body["choices"]] == ["It is Eve ."] * 2
    assert body["choices"][1]["message"]["reasoning"] == "So Eve"
    assert (body["seed"], body["choices"][0]["finish_reason"]) == (5, "stop")
    assert body["usage"]["completion_tokens"] == 12
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 4


@pytest.mark.parametrize("stream", [True, False])
async def test_thinking_that_is_not_wanted_is_counted_and_not_shown(stream: bool) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    response = await chat(ScriptedBackend(thought="So Eve"), include_reasoning=False, **options)
    assert "So" not in response.text
    assert "reasoning_content" not in response.text
    last = events(response)[-1] if stream else response.json()
    assert last["usage"]["completion_tokens_details"]["reasoning_tokens"] == 2


async def test_a_stream_equals_the_whole_answer() -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        usual = {"stream": True, "stream_options": {"include_usage": True}, "n": 2}
        chunks = events(await post(ScriptedBackend(), path, body | usual))
        whole = (await post(ScriptedBackend(), path, body | {"n": 2})).json()
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"] == whole["usage"]
        texts = ["", ""]
        for choice in (choice for chunk in chunks for choice in chunk["choices"]):
            texts[choice["index"]] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
        assert texts == ["It is Eve ."] * 2
        assert len({chunk["id"] for chunk in chunks}) == 1


async def test_usage_is_streamed_only_on_demand() -> None:
    assert all("usage" not in chunk for chunk in events(await chat(ScriptedBackend(), stream=True)))


async def test_whole_answers_and_streams_have_the_same_explanations() -> None:
    whole = (await chat(ScriptedBackend(), guidance={"explain": True})).json()["choices"][0]["guidance"]["tokens"]
    chunks = events(await chat(ScriptedBackend(), guidance={"explain": True}, stream=True))
    assert [token for chunk in chunks for token in chunk["choices"][0]["guidance"]["tokens"]] == whole
    assert [(token["text"], token["alpha"], token["changed"]) for token in whole[:2]] == [
        ("It", 1.0, False),
        (" is", 1.0, True),
    ]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "word"),
    [
        ("POST", "/v1/chat/completions", b"{", 400, "not JSON"),
        ("POST", "/v1/chat/completions", b"[" * 100_000, 400, "not JSON"),
        ("POST", "/v1/chat/completions", b"\xff", 400, "not JSON"),
        ("POST", "/v1/completions", b'{"model": "duo", "prompt": "\\ud800"}', 400, "surrogates"),
        ("POST", "/v1/completions", b'{"model": "duo", "prompt": ""}', 400, "empty"),
        ("POST", "/v1/completions", b'{"model": "duo", "prompt": "a", "guidance": {"alpha": NaN}}', 400, "finite"),
        ("POST", "/v1/completions", b'{"model": "duo", "prompt": "a", "colour": 1}', 400, "colour"),
        ("POST", "/v1/completions", b'{"model": "gpt", "prompt": "a"}', 404, "served are duo"),
        ("GET", "/v1/models/gpt", b"", 404, "served are duo"),
        ("GET", "/v1/models/%0A", b"", 404, "there is no model"),
        ("GET", "/v2", b"", 404, "Not Found"),
        ("GET", "/v1/completions", b"", 405, "Method Not Allowed"),
    ],
)
async def test_every_error_has_openais_form(method: str, path: str, body: bytes, status: int, word: str) -> None:
    async with client(ScriptedBackend()) as http:
        response = await http.request(method, path, content=body, headers=JSON)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["request_id"] == response.headers["x-request-id"]
    assert word in error["message"]
    assert error["type"] == "invalid_request_error"


async def test_a_body_too_large_is_refused_before_it_is_read() -> None:
    service = config(router={"max_request_bytes": 2048})
    read = 0

    async def endless() -> Any:
        nonlocal read
        for _ in range(1000):
            read += 1024
            yield b" " * 1024

    async with client(ScriptedBackend(), service) as http:
        response = await http.post("/v1/completions", content=endless(), headers=JSON)
        stated = await http.post("/v1/completions", content=b" " * 5000, headers=JSON)
    assert (response.status_code, stated.status_code) == (413, 413)
    assert read <= 4096
    assert "2048 bytes" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("overloaded", 429, "rate_limit_error"),
        ("unavailable", 503, "service_unavailable_error"),
        ("invalid", 400, "invalid_request_error"),
    ],
)
async def test_a_rejected_request_keeps_its_own_status(stream: bool, code: Any, status: int, kind: str) -> None:
    backend = ScriptedBackend()
    backend.rejected = Rejected(code, "not now", 3.0)
    response = await chat(backend, stream=stream)
    assert (response.status_code, response.headers["Retry-After"]) == (status, "3")
    assert response.json()["error"]["type"] == kind


async def test_an_error_within_a_stream_is_its_last_event() -> None:
    backend = ScriptedBackend()
    backend.error = "the target's memory is full"
    response = await chat(backend, stream=True)
    last = json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert response.status_code == 200
    assert last["error"]["message"] == "the target's memory is full"
    assert last["error"]["request_id"] == response.headers["x-request-id"]
    assert last["error"]["choices"] == [{"index": 0, "token_ids": [0, 1, 2, 3]}]
    assert "[DONE]" not in response.text


@pytest.mark.parametrize("stream", [True, False])
async def test_details_of_unexpected_errors_go_only_to_the_log(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    backend = ScriptedBackend()
    backend.fail = RuntimeError("a secret path")
    response = await post(
        backend, "/v1/chat/completions", CHAT | {"stream": stream}, headers={"X-Request-Id": "mine-1"}
    )
    assert "a secret path" not in response.text
    assert "request id mine-1" in response.text
    assert "a secret path" in caplog.text


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_ends_at_the_services_deadline(stream: bool) -> None:
    backend = ScriptedBackend()
    backend.proceed = asyncio.Event()
    service = config(deadlines={"request_s": 0.05})
    response = await post(backend, "/v1/chat/completions", CHAT | {"stream": stream}, service)
    assert '"timeout_error"' in response.text
    assert len(backend.cancelled) == 1


async def test_a_request_id_is_kept_or_created() -> None:
    async with client(ScriptedBackend()) as http:
        given = await http.post("/v1/completions", json=TEXT, headers={"X-Request-Id": "mine-1"})
        created = await http.post("/v1/completions", json=TEXT)
    assert given.headers["X-Request-Id"] == "mine-1"
    assert given.json()["id"] == "cmpl-mine-1"
    assert len(created.headers["X-Request-Id"]) == 32


@pytest.mark.parametrize("stream", [True, False])
async def test_the_bodys_request_id_is_the_one_everywhere(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "router.request_log")
    backend = ScriptedBackend()
    body = TEXT | {"request_id": "Zo\u00eb 7", "stream": stream}
    response = await post(backend, "/v1/completions", body, headers={"X-Request-Id": "gateway"})
    (header,) = (value for name, value in response.headers.raw if name.lower() == b"x-request-id")
    assert header.decode() == "Zo\u00eb 7"
    answer = events(response)[0] if stream else response.json()
    assert answer["id"] == "cmpl-Zo\u00eb 7"
    assert backend.requests[0].request_id.startswith("Zo\\xeb 7.")
    assert [json.loads(line)["request_id"] for line in caplog.messages] == ["Zo\u00eb 7"]


async def test_errors_have_the_bodys_request_id_once_the_body_is_read() -> None:
    headers = {"X-Request-Id": "gateway"}
    planned = await post(ScriptedBackend(), "/v1/completions", TEXT | {"request_id": "mine", "n": 129}, headers=headers)
    assert planned.json()["error"]["request_id"] == planned.headers["X-Request-Id"] == "gateway"
    refused = await post(
        ScriptedBackend(), "/v1/completions", TEXT | {"request_id": "mine", "model": "x"}, headers=headers
    )
    assert refused.json()["error"]["request_id"] == refused.headers["X-Request-Id"] == "mine"
    backend = ScriptedBackend()
    backend.error = "lost"
    failed = await post(backend, "/v1/completions", TEXT | {"request_id": "mine", "stream": True}, headers=headers)
    assert '"request_id":"mine"' in failed.text


@pytest.mark.parametrize("request_id", ["", "a" * 257, "a\r\nSet-Cookie: b", "a\u2028b", " a", "a\n", 7])
async def test_a_request_id_that_no_header_can_have_is_refused(request_id: Any) -> None:
    response = await post(ScriptedBackend(), "/v1/completions", TEXT | {"request_id": request_id})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "request_id")
    assert len(response.headers["X-Request-Id"]) == 32


# -- metrics

TIMES = ("time_to_first_token_ms", "generation_time_ms", "queue_time_ms", "mean_itl_ms", "tokens_per_second")


@pytest.mark.parametrize("usual", [{}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}])
async def test_metrics_come_with_the_answer_if_they_are_wanted(usual: dict[str, Any]) -> None:
    response = await chat(ScriptedBackend(), include_metrics=True, **usual)
    last = events(response)[-1] if usual else response.json()
    metrics = last["metrics"]
    assert tuple(metrics) == TIMES
    assert all(metrics[name] >= 0 for name in ("time_to_first_token_ms", "generation_time_ms"))
    assert metrics["queue_time_ms"] == 0.0
    assert ("usage" in last) is ("stream" not in usual or "stream_options" in usual)
    if usual:
        assert last["choices"] == []
        assert all("metrics" not in chunk for chunk in events(response)[:-1])


async def test_answers_have_no_metrics_unless_they_are_wanted() -> None:
    assert (await chat(ScriptedBackend())).json()["metrics"] is None
    assert "metrics" not in (await chat(ScriptedBackend(), stream=True)).text


async def test_several_answers_have_no_times_in_common() -> None:
    assert (await chat(ScriptedBackend(), include_metrics=True, n=2)).json()["metrics"] is None


async def test_ready_names_a_missing_role_while_health_is_ok() -> None:
    backend = ScriptedBackend()
    async with client(backend) as http:
        assert (await http.get("/ready")).json() == {"status": "ready"}
        backend.current_status = Status(("guider",), ("guider: loading 2 of 3 GB",))
        assert (await http.get("/health")).status_code == 200
        response = await http.get("/ready")
    assert response.status_code == 503
    assert response.json()["missing"] == ["guider"]
    assert response.json()["awaited"] == ["guider: loading 2 of 3 GB"]


class Connection:
    """One request over plain ASGI; its client can disconnect at any time."""

    def __init__(self, backend: ScriptedBackend, body: dict[str, Any], service: ServiceConfig | None) -> None:
        self._app = create_app(service or config(), tokenizers(), backend)
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": json.dumps(body).encode()})
        self.sent: asyncio.Queue[Any] = asyncio.Queue()
        self.closed = False

    async def serve(self) -> None:
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "root_path": ""}
        await self._app(scope | {"headers": headers}, self._incoming.get, self._send)

    def disconnect(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def _send(self, message: Any) -> None:
        if self.closed:
            raise OSError
        self.sent.put_nowait(message)


async def begun(
    backend: ScriptedBackend, body: dict[str, Any], service: ServiceConfig | None = None
) -> tuple[Connection, asyncio.Task[None]]:
    backend.proceed = asyncio.Event()
    connection = Connection(backend, CHAT | body, service)
    serving = asyncio.create_task(connection.serve())
    async with asyncio.timeout(HANG_S):
        for _ in range(body.get("n", 1)):
            await backend.began.acquire()
    return connection, serving


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_disconnect_cancels_its_generations(stream: bool) -> None:
    backend = ScriptedBackend()
    connection, serving = await begun(backend, {"stream": stream, "n": 3})
    connection.disconnect()
    await asyncio.wait_for(serving, HANG_S)
    assert len(backend.cancelled) == 3


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_dropped_by_the_server_cancels_its_generations(stream: bool) -> None:
    backend = ScriptedBackend()
    _, serving = await begun(backend, {"stream": stream})
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(serving, HANG_S)
    assert len(backend.cancelled) == 1


async def test_sending_to_a_closed_connection_ends_the_stream_quietly() -> None:
    backend = ScriptedBackend()
    connection, serving = await begun(backend, {"stream": True})
    assert (await connection.sent.get())["type"] == "http.response.start"
    connection.closed = True
    assert backend.proceed is not None
    backend.proceed.set()
    await asyncio.wait_for(serving, HANG_S)


async def test_the_first_token_does_not_wait_for_the_second() -> None:
    backend = ScriptedBackend()
    connection, serving = await begun(backend, {"stream": True})
    assert (await connection.sent.get())["status"] == 200
    assert b'"content":"It"' in (await connection.sent.get())["body"]
    connection.disconnect()
    await asyncio.wait_for(serving, HANG_S)


async def test_token_ids_are_returned_on_request() -> None:
    usual = {"return_token_ids": True, "n": 2}
    whole = (await chat(ScriptedBackend(), **usual)).json()
    chunks = events(await chat(ScriptedBackend(), stream=True, **usual))
    assert [choice["token_ids"] for choice in whole["choices"]] == [[0, 1, 2, 3]] * 2
    assert [i for chunk in chunks for c in chunk["choices"] if c["index"] == 1 for i in c["token_ids"]] == [0, 1, 2, 3]
    assert ["prompt_token_ids" in chunk for chunk in chunks] == [True, True] + [False] * (len(chunks) - 2)
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert whole["usage"]["prompt_tokens"] == len(whole["prompt_token_ids"])
    prompts = [[1, 2], [3]]
    text = {"model": "duo", "prompt": prompts, "return_token_ids": True}
    whole = (await post(ScriptedBackend(), "/v1/completions", text)).json()
    chunks = events(await post(ScriptedBackend(), "/v1/completions", text | {"stream": True}))
    assert [choice["prompt_token_ids"] for choice in whole["choices"]] == prompts
    begun = [c for chunk in chunks for c in chunk["choices"] if "prompt_token_ids" in c]
    assert [(c["index"], c["prompt_token_ids"]) for c in begun] == list(enumerate(prompts))


async def test_usage_is_in_every_chunk_on_request() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = events(await chat(ScriptedBackend(), stream=True, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"] == 4
    assert chunks[0]["usage"]["prompt_tokens"] == last["usage"]["prompt_tokens"]
    alone = {"continuous_usage_stats": True}  # as in vLLM it needs include_usage
    assert not any(
        "usage" in chunk for chunk in events(await chat(ScriptedBackend(), stream=True, stream_options=alone))
    )


async def test_stream_options_without_a_stream_are_refused() -> None:
    response = await chat(ScriptedBackend(), stream_options={"include_usage": True})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "stream_options")


async def test_an_idle_stream_sends_keep_alives() -> None:
    backend = ScriptedBackend()
    connection, serving = await begun(backend, {"stream": True}, config(router={"keep_alive_s": 0.02}))
    bodies = [(await connection.sent.get()).get("body", b"") for _ in range(4)]
    assert b'"content":"It"' in bodies[1]
    assert bodies[2:] == [b": keep-alive\n\n"] * 2
    assert backend.proceed is not None
    backend.proceed.set()
    await asyncio.wait_for(serving, HANG_S)
    rest = [connection.sent.get_nowait()["body"] for _ in range(connection.sent.qsize())]
    assert rest.pop() == b""
    assert rest.pop().endswith(b"data: [DONE]\n\n")


async def test_a_stream_sends_keep_alives_before_its_first_token() -> None:
    class Silent(ScriptedBackend):
        async def generate(self, request: Generate) -> AsyncIterator[Event]:
            await asyncio.sleep(0.1)
            yield Rejected("overloaded", "not now")

    text = (
        await post(Silent(), "/v1/completions", TEXT | {"stream": True}, config(router={"keep_alive_s": 0.02}))
    ).text
    assert text.startswith(": keep-alive\n\n")
    assert json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]["type"] == "rate_limit_error"


def test_importing_the_api_loads_neither_torch_nor_ray() -> None:
    code = "import sys, router.api; print([m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=HANG_S)
    assert run.stdout.strip() == "[]"


async def test_bytes_of_half_a_surrogate_pair_are_refused() -> None:
    body = b'{"model": "duo", "messages": [{"role": "user", "content": "\xed\xa0\x80"}]}'
    async with client(ScriptedBackend()) as http:
        for address in ("/v1/chat/completions", "/tokenize"):
            assert (await http.post(address, content=body, headers=JSON)).status_code == 400


async def test_metrics_accept_any_version_and_no_address_redirects() -> None:
    async with client(ScriptedBackend()) as http:
        accept = {"Accept": "application/openmetrics-text;version=abc"}
        assert (await http.get("/metrics", headers=accept)).status_code == 200
        assert (await http.post("/v1/chat/completions/", json={})).status_code == 400  # no messages
