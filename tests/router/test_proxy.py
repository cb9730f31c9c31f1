"""The HTTP server of Serve's proxy as the callback sets it, in this process and without Ray's processes."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvicorn.config
import yaml
from ray.serve._private import http_util
from ray.serve.config import HTTPOptions
from starlette.types import Receive, Scope, Send

from cluster.launch import LOOPBACK, PROXY_HOOK, SETTINGS, free_port
from router.api import create_app
from tests.support.deadlines import HANG_S
from tests.support.scripted_service import ScriptedBackend, config, tokenizers

ROOT = Path(__file__).parents[2]
BODY = json.dumps({"model": "duo", "prompt": "Hi"}).encode()
READ_BY_SERVE = (b"x-request-id", b"serve_multiplexed_model_id", b"x-session-id", b"x-request-timeout-seconds")
JAVA = (  # the first request of java.net.http.HttpClient on a connection
    b"Connection: Upgrade, HTTP2-Settings\r\n"
    b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
    b"Upgrade: h2c\r\n"
    b"User-Agent: Java-http-client/21.0.2\r\n"
)


def request(*headers: bytes, body: bytes = BODY, path: bytes = b"/v1/completions") -> bytes:
    fields = [b"Host: service", b"Content-Type: application/json", b"Content-Length: %d" % len(body), *headers]
    lines = b"\r\n".join(field.rstrip(b"\r\n") for field in fields)
    return b"POST " + path + b" HTTP/1.1\r\n" + lines + b"\r\n\r\n" + body


class Answer:
    """One response as it arrived: status, header fields in their order, body."""

    def __init__(self, head: bytes, body: bytes) -> None:
        first, *fields = head.split(b"\r\n")
        self.status = int(first.split()[1])
        self.fields = [(name.lower(), value.strip()) for name, _, value in (field.partition(b":") for field in fields)]
        self.body = body

    @property
    def request_ids(self) -> list[bytes]:
        return [value for name, value in self.fields if name == b"x-request-id"]


async def read(reader: asyncio.StreamReader) -> Answer:
    """The next response of a connection."""
    async with asyncio.timeout(HANG_S):
        head = (await reader.readuntil(b"\r\n\r\n")).removesuffix(b"\r\n\r\n")
        if length := re.search(rb"content-length: (\d+)", head, re.IGNORECASE):
            return Answer(head, await reader.readexactly(int(length[1])))
        body = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readuntil(b"\r\n")
        return Answer(head, body)


async def exchange(port: int, *pieces: bytes, answers: int = 1) -> list[Answer]:
    """Send bytes over one connection, piece by piece; the responses."""
    reader, writer = await asyncio.open_connection(LOOPBACK, port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        return [await read(reader) for _ in range(answers)]
    finally:
        writer.close()


@asynccontextmanager
async def proxy(backend: ScriptedBackend) -> AsyncIterator[int]:
    """The port of Serve's HTTP server before the router; headers are decoded in between, as Serve does."""
    app = create_app(config(), tokenizers(), backend)

    async def serve_decodes(scope: Scope, receive: Receive, send: Send) -> None:
        for name, value in scope["headers"]:
            if name in READ_BY_SERVE:
                value.decode()
        await app(scope, receive, send)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", "auto")  # restored afterwards
        (callback,) = PROXY_HOOK.values()
        patch.setattr(http_util, "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", callback)
        asked = http_util.configure_http_options_with_defaults(HTTPOptions(host=LOOPBACK, port=free_port()))
        options = http_util.configure_http_middlewares(asked)
        loop = asyncio.get_running_loop()
        running, server = await http_util.start_asgi_http_server(serve_decodes, options, event_loop=loop)
        try:
            async with asyncio.timeout(HANG_S):
                while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
                    await asyncio.sleep(0.01)
            yield options.port
        finally:
            server.should_exit = server.force_exit = True
            await running


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend()


@pytest.fixture
async def port(backend: ScriptedBackend) -> AsyncIterator[int]:
    async with proxy(backend) as port:
        yield port


async def test_java_can_post_and_keep_its_connection(port: int, backend: ScriptedBackend) -> None:
    first, second = await exchange(port, request(JAVA), request(), answers=2)
    assert (first.status, second.status) == (200, 200)
    assert json.loads(first.body)["choices"][0]["text"] == "It is Eve ."
    assert len(backend.requests) == 2


@pytest.mark.parametrize("size", [1, 7, 64, 300])
async def test_an_offer_of_an_upgrade_may_arrive_in_pieces(size: int, port: int) -> None:
    sent = request(JAVA)
    (answer,) = await exchange(port, *(sent[at : at + size] for at in range(0, len(sent), size)))
    assert answer.status == 200


async def test_offers_of_pipelined_requests_are_all_declined(port: int, backend: ScriptedBackend) -> None:
    answers = await exchange(port, request(JAVA) * 3 + request() + request(JAVA), answers=5)
    assert [answer.status for answer in answers] == [200] * 5
    assert len(backend.requests) == 5


@pytest.mark.parametrize("offer", [b"h2c", b"TLS/1.0", b"h2c, foo", b"H2C"])
async def test_a_chunked_body_survives_any_declined_upgrade(offer: bytes, port: int) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: service\r\nContent-Type: application/json\r\n"
    head += b"Transfer-Encoding: chunked\r\nConnection: upgrade\r\nUpgrade: " + offer + b"\r\n\r\n"
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    (answer,) = await exchange(port, head, chunks)
    assert answer.status == 200


async def test_an_offer_without_a_body_is_declined(port: int) -> None:
    get = b"GET /v1/models HTTP/1.1\r\nHost: service\r\n" + JAVA + b"\r\n"
    first, second = await exchange(port, get, get, answers=2)
    assert (first.status, second.status) == (200, 200)


async def test_a_stream_reaches_a_client_that_offers_an_upgrade(port: int) -> None:
    (answer,) = await exchange(port, request(JAVA, body=json.dumps({"prompt": "Hi", "stream": True}).encode()))
    assert answer.body.endswith(b"data: [DONE]\n\n")


async def test_a_request_to_close_is_kept_beside_an_offer(port: int) -> None:
    offer = b"Connection: close, Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AA\r\nUpgrade: h2c"
    (answer,) = await exchange(port, request(offer))
    assert (b"connection", b"close") in answer.fields


@pytest.mark.parametrize("bad", [b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", b"\x00\x01\r\n\r\n", b"POST /\r\n\r\n"])
async def test_bytes_that_are_no_request_get_one_error(bad: bytes, port: int) -> None:
    (answer,) = await exchange(port, bad)
    assert 400 <= answer.status < 500


@pytest.mark.parametrize(
    "given",
    [b"mine-1", b"a b", b"trace/1:2,3;x", "Zo\u00eb \u6f22".encode(), b"\xff\xfe", b'{"id": 1}', b"a\tb", b"x" * 256],
)
async def test_a_response_has_one_request_id_the_clients(given: bytes, port: int) -> None:
    for body, status in ((BODY, 200), (b"{", 400)):
        (answer,) = await exchange(port, request(b"X-Request-ID: " + given, body=body))
        assert (answer.status, answer.request_ids) == (status, [given])
    text = json.loads(answer.body)["error"]["request_id"]
    assert text.encode() == given or text.encode("latin-1") == given


@pytest.mark.parametrize("character", [b"x", b"\xfe", "\u00eb".encode(), "\u6f22".encode()])
async def test_a_long_request_id_is_cut(character: bytes, port: int) -> None:
    (answer,) = await exchange(port, request(b"X-Request-Id: " + character * 5_000))
    assert answer.request_ids == [character * 256]


@pytest.mark.parametrize("blank", [b"", b"X-Request-Id:", b"X-Request-Id:   "])
async def test_a_request_without_an_id_gets_one(blank: bytes, port: int) -> None:
    (answer,) = await exchange(port, request(*filter(None, [blank]), body=b"{"))
    (created,) = answer.request_ids
    assert re.fullmatch(rb"[0-9a-f]{32}", created)
    assert json.loads(answer.body)["error"]["request_id"] == created.decode()


@pytest.mark.parametrize("given", [b"", b"X-Request-Id: gateway", b"X-Request-Id: \xff"])
async def test_the_id_in_the_body_passes_the_proxy(given: bytes, port: int) -> None:
    body = json.dumps({"prompt": "Hi", "request_id": "mine"}).encode()
    (answer,) = await exchange(port, request(*filter(None, [given]), body=body))
    assert (answer.request_ids, json.loads(answer.body)["id"]) == ([b"mine"], "cmpl-mine")


async def test_of_two_request_ids_the_first_counts(port: int) -> None:
    (answer,) = await exchange(port, request(b"X-Request-Id: a", b"x-request-id: b"))
    assert answer.request_ids == [b"a"]


@pytest.mark.parametrize("name", READ_BY_SERVE)
async def test_a_header_that_is_not_utf8_is_served(name: bytes, port: int) -> None:
    (answer,) = await exchange(port, request(name + b": \xff\xfe\x80"))
    assert answer.status == 200


def test_processes_that_start_a_proxy_have_the_callback() -> None:
    """The image, KubeRay and `ray up`; a Ray that the code starts takes the settings of `cluster.launch`."""
    ((name, value),) = PROXY_HOOK.items()
    assert PROXY_HOOK.items() <= SETTINGS.items()
    assert f"{name}={value}" in (ROOT / "Dockerfile").read_text(encoding="utf-8")
    for cloud in ("aws", "gcp"):
        docker = yaml.safe_load((ROOT / "cluster" / f"{cloud}.yaml").read_text(encoding="utf-8"))["docker"]
        assert f"--env {name}={value}" in docker["run_options"]
    cluster = yaml.safe_load((ROOT / "cluster" / "kuberay.yaml").read_text(encoding="utf-8"))["spec"][
        "rayClusterConfig"
    ]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert {"name": name, "value": value} in group["template"]["spec"]["containers"][0]["env"]
