"""The service over three hosts: answers, addresses, TLS and authentication, and a link that is cut."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from actors.api.generation import ROLES, Role
from actors.config import load_config
from actors.replica.engine_thread import Engine
from actors.wire.framing import HEADER, frame
from actors.wire.handshake import CoordinatorHandshake
from actors.wire.messages import Challenge, decode, encode
from actors.wire.tls import client_context
from benchmarks.hosts import NoHosts, require_rights
from router.api import create_app
from tests.support.deadlines import HANG_S
from tests.support.local_backend import LocalBackend
from tests.support.local_ray import APPLICATION, READY_S, wait_until
from tests.support.local_service import local_service
from tests.support.machines import Machines, machines, roles_apart
from tests.support.trio import chat_prompts

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("no_shared_ray")]

DELAY_S = 0.001
LENGTH = 200  # tokens of a stream
CUT_S = 4.0
LABELS = [{"thinklogit-node": "large"}, {"thinklogit-node": "small"}]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    try:
        require_rights()
    except NoHosts as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("machines")
    with machines(LABELS, folder, DELAY_S) as running:
        running.deploy(roles_apart(), folder)
        yield running


@pytest.fixture(scope="module")
def endpoints(cluster: Machines) -> dict[Role, tuple[str, int]]:
    """The address on which each role listens, from the directory."""
    found = cluster.answer(
        f"from ray import serve\n"
        f"seen = serve.get_deployment_handle('Directory', '{APPLICATION}').snapshot.remote().result(timeout_s=30)\n"
        f"print(json.dumps({{e.role: [e.host, e.port] for e in seen.endpoints}}))"
    )
    return {role: (found[role][0], found[role][1]) for role in ROLES}


async def in_one_process(engines: Mapping[Role, Engine], bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers to requests by the same service without Ray."""
    config = load_config(roles_apart())
    async with local_service(config, engines) as service:
        app = create_app(config, service.tokenizers, LocalBackend(service))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://service", timeout=READY_S) as client:
            answers = [await client.post("/v1/chat/completions", json=body) for body in bodies]
            return [answer.raise_for_status().json() for answer in answers]


def body(text: str, seed: int, tokens: int = 48, **more: Any) -> dict[str, Any]:
    common = {"model": APPLICATION, "messages": [{"role": "user", "content": text}], "seed": seed}
    return common | {"temperature": 1.0, "max_tokens": tokens, "guidance": {"explain": True}} | more


def choice(answer: dict[str, Any]) -> tuple[str, list[int]]:
    """The text and the tokens of an explained answer."""
    (one,) = answer["choices"]
    return one["message"]["content"], [token["id"] for token in one["guidance"]["tokens"]]


async def test_three_hosts_give_the_answers_of_one_process(
    cluster: Machines, trio_engines: Mapping[Role, Engine]
) -> None:
    bodies = [body(text, seed) for seed, text in enumerate(chat_prompts(4))]
    expected = await in_one_process(trio_engines, bodies)
    with cluster.head.inside(), httpx.Client(base_url=cluster.url, timeout=READY_S) as client:
        answers = [client.post("/v1/chat/completions", json=body).raise_for_status().json() for body in bodies]  # noqa: ASYNC212 - nothing else runs here
    assert [choice(answer) for answer in answers] == [choice(answer) for answer in expected]


def test_each_role_listens_on_its_hosts_address_only(cluster: Machines, endpoints: dict[Role, tuple[str, int]]) -> None:
    _, large, small = cluster.network.hosts
    assert {role: host for role, (host, _) in endpoints.items()} == {
        "target": large.address,
        "guider": small.address,
        "guider_base": small.address,
    }
    for role, (_, port) in endpoints.items():
        with (large if role == "target" else small).inside():
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), timeout=HANG_S)


def reply(connection: socket.socket, data: bytes) -> bytes:
    """The bytes that the other side answers; empty if it closes the connection."""
    connection.settimeout(10)
    try:
        connection.sendall(data)
        return connection.recv(1 << 12)
    except (ConnectionError, ssl.SSLError):
        return b""


def test_wire_requires_tls_and_a_certificate_of_the_authority(
    cluster: Machines, endpoints: dict[Role, tuple[str, int]]
) -> None:
    hello = frame(encode(CoordinatorHandshake(bytes(32), "", "stranger").hello), None, 1 << 12)
    member = client_context(cluster.environment)
    assert member is not None
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    stranger.check_hostname, stranger.verify_mode = False, ssl.CERT_NONE
    for where in endpoints.values():
        with cluster.head.inside():
            with socket.create_connection(where, timeout=HANG_S) as plain:
                assert reply(plain, hello)[:1] in (b"", b"\x15")  # an alert of TLS at most
            with stranger.wrap_socket(socket.create_connection(where, timeout=HANG_S)) as without:
                assert reply(without, hello) == b""
            with member.wrap_socket(socket.create_connection(where, timeout=HANG_S)) as known:
                assert isinstance(decode(reply(known, hello)[HEADER.size :]), Challenge)


def test_driver_without_the_token_is_refused(cluster: Machines) -> None:
    wrong = {"RAY_AUTH_TOKEN": "00" * 32, "RAY_AUTH_TOKEN_PATH": ""}
    refused = cluster.driver("ray.init(ADDRESS, log_to_driver=False)\nprint('connected')", **wrong)
    assert refused.returncode != 0
    assert "connected" not in refused.stdout
    assert "AuthenticationError" in refused.stderr or "Unauthenticated" in refused.stderr


@dataclass
class StreamReading:
    """A client that reads one stream, in a thread on the head's host."""

    cluster: Machines
    body: dict[str, Any]
    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    reason: str | None = None
    error: Any = None

    def read(self) -> None:
        with self.cluster.head.inside(), httpx.Client(base_url=self.cluster.url, timeout=READY_S) as client:
            with client.stream("POST", "/v1/chat/completions", json=self.body | {"stream": True}) as response:
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        self._take(json.loads(line.removeprefix("data: ")))

    def _take(self, chunk: dict[str, Any]) -> None:
        self.error = chunk.get("error", self.error)
        for one in chunk.get("choices", []):
            new = [token["id"] for token in (one.get("guidance") or {}).get("tokens", [])]
            self.ids += new
            self.times += [time.monotonic()] * len(new)
            self.reason = one["finish_reason"] or self.reason


@pytest.mark.parametrize("away", [1, 2], ids=["target", "small models"])
async def test_link_that_is_cut_for_seconds_changes_no_token(
    cluster: Machines, trio_engines: Mapping[Role, Engine], away: int
) -> None:
    bodies = [body(text, seed, LENGTH, min_tokens=LENGTH) for seed, text in enumerate(chat_prompts(2))]
    expected = await in_one_process(trio_engines, bodies)
    readers = [StreamReading(cluster, body) for body in bodies]
    threads = [threading.Thread(target=reader.read) for reader in readers]
    for thread in threads:
        thread.start()
    host, network = cluster.network.hosts[away], cluster.network
    wait_until(lambda: min(len(reader.ids) for reader in readers) >= 20, "twenty tokens of each stream")
    dropped = network.dropped()
    network.cut(host)
    cut_at = time.monotonic()
    time.sleep(CUT_S)  # noqa: ASYNC251 - the streams are read by threads
    network.heal(host)
    healed_at = time.monotonic()
    for thread in threads:
        thread.join(READY_S)
    assert network.dropped() > dropped
    for reader, answer in zip(readers, expected, strict=True):
        assert reader.error is None
        assert reader.reason == "length"
        assert reader.ids == choice(answer)[1]
        assert not [
            at for at in reader.times if cut_at + 1 < at < healed_at
        ]  # nothing was decoded while the link was cut
        print(
            f"{host.name}: {min(at for at in reader.times if at > healed_at) - healed_at:.1f} s after the link healed"
        )
