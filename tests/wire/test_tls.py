"""The wire over TLS with Ray's certificates."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from actors.wire import tls
from actors.wire.client import Connection
from actors.wire.errors import ConnectionLost
from actors.wire.messages import Lookup, encode
from actors.wire.server import Server
from tests.support.certificates import ray_tls_settings
from tests.support.deadlines import HANG_S
from tests.support.wire_peers import SECRET, WELCOME, Inbox


@pytest.fixture(scope="module")
def ray_settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """RAY_TLS_* variables with a new authority and a certificate of it."""
    return ray_tls_settings(tmp_path_factory.mktemp("tls"))


async def test_with_tls_messages_flow_and_frames_have_no_mac(ray_settings: dict[str, str]) -> None:
    server = Server(
        SECRET,
        WELCOME,
        lambda peer, message: peer.send(message),
        lambda peer: None,
        tls=tls.server_context(ray_settings),
    )
    port = await server.start("127.0.0.1")
    inbox = Inbox()
    connection = await Connection.open(
        "127.0.0.1",
        port,
        SECRET,
        on_message=inbox.messages.put_nowait,
        on_closed=inbox.ended.set_result,
        tls=tls.client_context(ray_settings),
    )
    before, message = connection.bytes_sent, Lookup(ids=np.arange(1000))
    connection.send(message)
    answer = await inbox.next()
    assert isinstance(answer, Lookup)
    assert answer.ids.tolist() == list(range(1000))
    assert connection.bytes_sent - before == 4 + len(encode(message))
    await connection.close()
    await server.close()


async def test_without_a_certificate_of_the_authority_no_connection_opens(ray_settings: dict[str, str]) -> None:
    server = Server(
        SECRET, WELCOME, lambda peer, message: None, lambda peer: None, tls=tls.server_context(ray_settings)
    )
    port = await server.start("127.0.0.1")
    inbox = Inbox()
    with pytest.raises(ConnectionLost):
        await Connection.open(
            "127.0.0.1",
            port,
            SECRET,
            on_message=inbox.messages.put_nowait,
            on_closed=inbox.ended.set_result,
            deadline_s=0.2,
        )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"not a TLS record at all, but long enough to be read as one")
    assert not (await asyncio.wait_for(reader.read(), HANG_S)).startswith(b"\x16")
    writer.close()
    assert server.peers == []
    await server.close()


def test_without_the_switch_there_is_no_tls() -> None:
    assert tls.server_context({}) is None
    assert tls.client_context({tls.SWITCH: "0"}) is None


def test_missing_and_broken_certificates_are_named(tmp_path: Path) -> None:
    with pytest.raises(tls.TlsSettingsError, match="RAY_TLS_SERVER_KEY, RAY_TLS_CA_CERT"):
        tls.server_context({tls.SWITCH: "1", tls.CERTIFICATE: "x"})
    broken = tmp_path / "broken.pem"
    broken.write_text("not a certificate")
    settings = {name: str(broken) for name in (tls.CERTIFICATE, tls.KEY, tls.AUTHORITY)}
    with pytest.raises(tls.TlsSettingsError, match="does not load"):
        tls.client_context({tls.SWITCH: "1", **settings})
