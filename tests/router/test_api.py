import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from actors.api.generation import Event, Generate, Rejected
from actors.config import ServiceConfig
from router.api import create_app
from router.backend import Status
from tests.support.scripted_service import Reciter, client, config, tokenizers

CHAT = {"model": "duo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}
TEXT = {"model": "duo", "prompt": "Hi"}
THINKS = {"thinking": {"start": "<think>"}}


async def post(backend: Reciter, path: str, body: Any, service: Any = None, **more: Any) -> httpx.Response:
    async with client(backend, service) as http:
        return await http.post(path, json=body, **more)


async def chat(backend: Reciter, **more: Any) -> httpx.Response:
    return await post(backend, "/v1/chat/completions", CHAT | more)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = response.text.strip().split("\n\n")
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


async def test_a_chat_is_answered_with_its_thinking_apart() -> None:
    response = await chat(Reciter(thought="So Eve", text="It is Eve ."), n=2, seed=5)
    body = response.json()
    assert [choice["message"]["content"] for choice in body["choices"]] == ["It is Eve ."] * 2
    assert body["choices"][1]["message"]["reasoning"] == "So Eve"
    assert (body["seed"], body["choices"][0]["finish_reason"]) == (5, "stop")
    assert body["usage"]["completion_tokens"] == 12
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 4


async def test_a_stream_says_what_the_whole_answer_says() -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        usual = {"stream": True, "stream_options": {"include_usage": True}, "n": 2}
        chunks = events(await post(Reciter(), path, body | usual))
        whole = (await post(Reciter(), path, body | {"n": 2})).json()
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"] == whole["usage"]
        said = ["", ""]
        for choice in (choice for chunk in chunks for choice in chunk["choices"]):
            said[choice["index"]] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
        assert said == ["It is Eve ."] * 2
        assert len({chunk["id"] for chunk in chunks}) == 1


async def test_usage_is_streamed_only_on_demand() -> None:
    assert all("usage" not in chunk for chunk in events(await chat(Reciter(), stream=True)))


async def test_explanations_come_with_both_kinds_of_answer() -> None:
    whole = (await chat(Reciter(), guidance={"explain": True})).json()["choices"][0]["guidance"]["tokens"]
    chunks = events(await chat(Reciter(), guidance={"explain": True}, stream=True))
    assert [token for chunk in chunks for token in chunk["choices"][0]["guidance"]["tokens"]] == whole
    assert [(token["text"], token["alpha"], token["changed"]) for token in whole[:2]] == [
        ("It", 1.0, False),
        (" is", 1.0, True),
    ]


async def test_the_official_client_reads_every_kind_of_answer() -> None:
    backend = Reciter(thought="So Eve")
    http: Any = client(backend)  # newer clients are typed for the successor of httpx, and take either
    async with openai.AsyncOpenAI(api_key="none", base_url="http://service/v1", http_client=http) as api:
        assert [model.id async for model in api.models.list()] == [
            "duo",
            "duo/target",
            "duo/guider",
            "duo/guider-base",
        ]
        assert (await api.models.retrieve("duo/guider-base")).id == "duo/guider-base"
        answer = await api.chat.completions.create(
            model="duo",
            messages=[{"role": "user", "content": "Hi"}],
            extra_body={"guidance": {"alpha": 0.5}, **THINKS},
        )
        assert answer.choices[0].message.content == "It is Eve ."
        assert answer.choices[0].message.model_extra == {"reasoning": "So Eve", "reasoning_content": "So Eve"}
        assert answer.usage is not None
        assert answer.usage.completion_tokens_details is not None
        assert answer.usage.completion_tokens_details.reasoning_tokens == 2
        history: list[Any] = [answer.choices[0].message, {"role": "user", "content": "And?"}]
        stream = await api.chat.completions.create(model="duo", messages=history, stream=True)
        said = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(said) == "It is Eve ."
        text = await api.completions.create(model="duo/target", prompt=["Hi", "Ho"], extra_body=THINKS)
        assert [choice.text for choice in text.choices] == ["It is Eve ."] * 2
        assert text.choices[0].model_extra is not None
        assert text.choices[0].model_extra["reasoning"] == "So Eve"
        with pytest.raises(openai.NotFoundError, match="served are duo, duo/target"):
            await api.completions.create(model="gpt", prompt="Hi")
        tool: Any = {"type": "function", "function": {"name": "f"}}
        with pytest.raises(openai.BadRequestError, match="tools is not supported"):
            await api.chat.completions.create(model="duo", messages=history, tools=[tool])
    assert backend.asked[0].guidance.alpha == 0.5


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
        ("GET", "/v2", b"", 404, "Not Found"),
        ("GET", "/v1/completions", b"", 405, "Method Not Allowed"),
    ],
)
async def test_every_refusal_has_the_form_of_openais(
    method: str, path: str, body: bytes, status: int, word: str
) -> None:
    async with client(Reciter()) as http:
        response = await http.request(method, path, content=body)
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

    async with client(Reciter(), service) as http:
        response = await http.post("/v1/completions", content=endless())
        stated = await http.post("/v1/completions", content=b" " * 5000)
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
async def test_what_is_not_taken_on_keeps_its_own_status(stream: bool, code: Any, status: int, kind: str) -> None:
    backend = Reciter()
    backend.rejected = Rejected(code, "not now", 3.0)
    response = await chat(backend, stream=stream)
    assert (response.status_code, response.headers["Retry-After"]) == (status, "3")
    assert response.json()["error"]["type"] == kind


async def test_an_error_within_a_stream_is_its_last_event() -> None:
    backend = Reciter()
    backend.error = "the target's memory is full"
    response = await chat(backend, stream=True)
    last = json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert response.status_code == 200
    assert last["error"]["message"] == "the target's memory is full"
    assert last["error"]["request_id"] == response.headers["x-request-id"]
    assert last["error"]["choices"] == [{"index": 0, "token_ids": [0, 1, 2, 3]}]
    assert "[DONE]" not in response.text


@pytest.mark.parametrize("stream", [True, False])
async def test_what_nobody_foresaw_goes_to_the_log_and_not_to_the_client(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    backend = Reciter()
    backend.fail = RuntimeError("a secret path")
    response = await post(
        backend, "/v1/chat/completions", CHAT | {"stream": stream}, headers={"X-Request-Id": "mine-1"}
    )
    assert "a secret path" not in response.text
    assert "request id mine-1" in response.text
    assert "a secret path" in caplog.text


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_ends_at_the_services_deadline(stream: bool) -> None:
    backend = Reciter()
    backend.gate = asyncio.Event()
    service = config(deadlines={"request_s": 0.05})
    response = await post(backend, "/v1/chat/completions", CHAT | {"stream": stream}, service)
    assert '"timeout_error"' in response.text
    assert len(backend.cancelled) == 1


async def test_a_request_id_is_taken_over_or_made() -> None:
    async with client(Reciter()) as http:
        given = await http.post("/v1/completions", json=TEXT, headers={"X-Request-Id": "mine-1"})
        odd = await http.post("/v1/completions", json=TEXT, headers={"X-Request-Id": "a b"})
    assert given.headers["X-Request-Id"] == "mine-1"
    assert given.json()["id"] == "cmpl-mine-1"
    assert len(odd.headers["X-Request-Id"]) == 32


async def test_health_is_live_while_a_role_is_missing_and_ready_names_it() -> None:
    backend = Reciter()
    async with client(backend) as http:
        assert (await http.get("/ready")).json() == {"status": "ready"}
        backend.now = Status(("guider",), ("guider: loading 2 of 3 GB",))
        assert (await http.get("/health")).status_code == 200
        response = await http.get("/ready")
    assert response.status_code == 503
    assert response.json()["missing"] == ["guider"]
    assert response.json()["awaited"] == ["guider: loading 2 of 3 GB"]


class Connection:
    """One request by hand, whose client can leave in the middle."""

    def __init__(self, backend: Reciter, body: dict[str, Any], service: ServiceConfig | None) -> None:
        self._app = create_app(service or config(), tokenizers(), backend)
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": json.dumps(body).encode()})
        self.sent: asyncio.Queue[Any] = asyncio.Queue()
        self.closed = False

    async def serve(self) -> None:
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "root_path": ""}
        await self._app(scope | {"headers": headers}, self._incoming.get, self._send)

    def leave(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def _send(self, message: Any) -> None:
        if self.closed:
            raise OSError
        self.sent.put_nowait(message)


async def begun(
    backend: Reciter, body: dict[str, Any], service: ServiceConfig | None = None
) -> tuple[Connection, asyncio.Task[None]]:
    backend.gate = asyncio.Event()
    connection = Connection(backend, CHAT | body, service)
    serving = asyncio.create_task(connection.serve())
    async with asyncio.timeout(30):
        for _ in range(body.get("n", 1)):
            await backend.began.acquire()
    return connection, serving


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_cancels_its_generations(stream: bool) -> None:
    backend = Reciter()
    connection, serving = await begun(backend, {"stream": stream, "n": 3})
    connection.leave()
    await asyncio.wait_for(serving, 30)
    assert len(backend.cancelled) == 3


@pytest.mark.parametrize("stream", [True, False])
async def test_a_server_that_drops_the_request_cancels_its_generations(stream: bool) -> None:
    backend = Reciter()
    _, serving = await begun(backend, {"stream": stream})
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(serving, 30)
    assert len(backend.cancelled) == 1


async def test_a_connection_found_closed_on_sending_ends_the_stream_quietly() -> None:
    backend = Reciter()
    connection, serving = await begun(backend, {"stream": True})
    assert (await connection.sent.get())["type"] == "http.response.start"
    connection.closed = True
    assert backend.gate is not None
    backend.gate.set()
    await asyncio.wait_for(serving, 30)


async def test_the_first_token_does_not_wait_for_the_second() -> None:
    backend = Reciter()
    connection, serving = await begun(backend, {"stream": True})
    assert (await connection.sent.get())["status"] == 200
    assert b'"content":"It"' in (await connection.sent.get())["body"]
    connection.leave()
    await asyncio.wait_for(serving, 30)


async def test_ids_are_returned_where_they_are_asked_for() -> None:
    usual = {"return_token_ids": True, "n": 2}
    whole = (await chat(Reciter(), **usual)).json()
    chunks = events(await chat(Reciter(), stream=True, **usual))
    assert [choice["token_ids"] for choice in whole["choices"]] == [[0, 1, 2, 3]] * 2
    assert [i for chunk in chunks for c in chunk["choices"] if c["index"] == 1 for i in c["token_ids"]] == [0, 1, 2, 3]
    assert ["prompt_token_ids" in chunk for chunk in chunks] == [True, True] + [False] * (len(chunks) - 2)
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert whole["usage"]["prompt_tokens"] == len(whole["prompt_token_ids"])
    prompts = [[1, 2], [3]]
    text = {"model": "duo", "prompt": prompts, "return_token_ids": True}
    whole = (await post(Reciter(), "/v1/completions", text)).json()
    chunks = events(await post(Reciter(), "/v1/completions", text | {"stream": True}))
    assert [choice["prompt_token_ids"] for choice in whole["choices"]] == prompts
    begun = [c for chunk in chunks for c in chunk["choices"] if "prompt_token_ids" in c]
    assert [(c["index"], c["prompt_token_ids"]) for c in begun] == list(enumerate(prompts))


async def test_usage_runs_along_where_it_is_asked_for() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = events(await chat(Reciter(), stream=True, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"] == 4
    assert chunks[0]["usage"]["prompt_tokens"] == last["usage"]["prompt_tokens"]
    alone = {"continuous_usage_stats": True}  # as in vLLM it needs include_usage
    assert not any("usage" in chunk for chunk in events(await chat(Reciter(), stream=True, stream_options=alone)))


async def test_stream_options_without_a_stream_are_refused() -> None:
    response = await chat(Reciter(), stream_options={"include_usage": True})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "stream_options")


async def test_an_idle_stream_says_that_it_lives() -> None:
    backend = Reciter()
    connection, serving = await begun(backend, {"stream": True}, config(router={"keep_alive_s": 0.02}))
    bodies = [(await connection.sent.get()).get("body", b"") for _ in range(4)]
    assert b'"content":"It"' in bodies[1]
    assert bodies[2:] == [b": keep-alive\n\n"] * 2
    assert backend.gate is not None
    backend.gate.set()
    await asyncio.wait_for(serving, 30)
    rest = [connection.sent.get_nowait()["body"] for _ in range(connection.sent.qsize())]
    assert rest[-2:] == [b"data: [DONE]\n\n", b""]


async def test_a_stream_that_waits_for_its_first_token_lives_too() -> None:
    class Silent(Reciter):
        async def generate(self, request: Generate) -> AsyncIterator[Event]:
            await asyncio.sleep(0.1)
            yield Rejected("overloaded", "not now")

    text = (
        await post(Silent(), "/v1/completions", TEXT | {"stream": True}, config(router={"keep_alive_s": 0.02}))
    ).text
    assert text.startswith(": keep-alive\n\n")
    assert json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]["type"] == "rate_limit_error"


def test_importing_it_loads_neither_torch_nor_ray() -> None:
    code = "import sys, router.api; print([m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "[]"


LONG = "x" * 1_025


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop", ["a"] * 65),
        ("stop", LONG),
        ("stop", [LONG]),
        ("bad_words", ["a"] * 1_025),
        ("bad_words", [LONG]),
        ("guidance", {"schedule": [[n, 1.0] for n in range(257)]}),
        ("guidance", {"alpha": 1e308}),
        ("thinking", {"end": LONG}),
        ("thinking", {"wait": LONG}),
    ],
)
async def test_what_every_token_would_pay_for_is_bounded(field: str, value: Any) -> None:
    body = {"model": "duo", "messages": [{"role": "user", "content": "Hi"}], field: value}
    async with client(Reciter()) as http:
        answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert field in answer.json()["error"]["message"] or "alpha" in answer.json()["error"]["message"]


async def test_bytes_of_half_a_character_are_no_json() -> None:
    body = b'{"model": "duo", "messages": [{"role": "user", "content": "\xed\xa0\x80"}]}'
    async with client(Reciter()) as http:
        for address in ("/v1/chat/completions", "/tokenize"):
            assert (await http.post(address, content=body)).status_code == 400


async def test_metrics_are_told_whatever_version_is_asked_for_and_no_address_is_moved() -> None:
    async with client(Reciter()) as http:
        accept = {"Accept": "application/openmetrics-text;version=abc"}
        assert (await http.get("/metrics", headers=accept)).status_code == 200
        assert (await http.post("/v1/chat/completions/", json={})).status_code == 404
