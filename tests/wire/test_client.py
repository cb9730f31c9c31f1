"""The connecting end, against real and misbehaving models."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pytest

from actors.wire.client import Connection
from actors.wire.errors import ConnectionLost, FrameTooLarge, HandshakeRefused, PeerStalled, RemoteFailure, WireError
from actors.wire.framing import HEADER, FrameBuffer, frame
from actors.wire.handshake import CoordinatorHandshake, ModelHandshake
from actors.wire.link import Limits
from actors.wire.messages import Hello, Lookup, Message, Proof, decode, encode
from tests.support.deadlines import HANG_S
from tests.support.wire_peers import SECRET, WELCOME, Inbox, echo


async def test_open_authenticates_and_messages_keep_their_order() -> None:
    async with echo() as running:
        connection, inbox = await running.connect(incarnation=WELCOME.incarnation)
        assert connection.welcome == connection.welcome
        assert connection.welcome.role == "guider"
        for count in range(20):
            connection.send(Lookup(ids=np.full(count, count)))
        for count in range(20):
            message = await inbox.next()
            assert isinstance(message, Lookup)
            assert message.ids.tolist() == [count] * count
        await connection.close()
        assert await inbox.end() is None


async def test_bytes_are_counted_with_their_framing_at_both_ends() -> None:
    async with echo() as running:
        connection, inbox = await running.connect()
        (peer,) = running.server.peers
        before = connection.bytes_sent
        message = Lookup(ids=np.arange(100))
        connection.send(message)
        await inbox.next()
        assert connection.bytes_sent - before == 4 + len(encode(message)) + 16
        assert (peer.bytes_received, peer.bytes_sent) == (connection.bytes_sent, connection.bytes_received)
        await connection.close()


@pytest.mark.parametrize(
    ("secret", "incarnation", "code"),
    [(b"not the secret of this app", "", "unauthenticated"), (SECRET, "g-0", "wrong_incarnation")],
)
async def test_a_refused_handshake_names_its_code(secret: bytes, incarnation: str, code: str) -> None:
    async with echo() as running:
        with pytest.raises(HandshakeRefused) as refused:
            await running.connect(secret, incarnation)
        assert refused.value.code == code
        assert running.server.peers == []
        assert running.disconnected.empty()


async def test_a_closed_port_and_a_silent_one_are_connection_lost() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(ConnectionLost, match="no connection"):
            await open_to(port)
        unused.listen()
        with pytest.raises(ConnectionLost, match="no answer"):
            await open_to(port, deadline_s=0.05)


async def test_sending_after_the_end_raises_connection_lost() -> None:
    async with echo() as running:
        connection, inbox = await running.connect()
        await running.server.close()
        assert isinstance(await inbox.end(), ConnectionLost)
        with pytest.raises(ConnectionLost):
            connection.send(Lookup())
        await connection.close()


async def test_a_message_over_the_frame_limit_leaves_the_connection_open() -> None:
    async with echo() as running:
        inbox = Inbox()
        connection = await open_to(running.port, inbox, limits=Limits(frame=1000))
        with pytest.raises(FrameTooLarge):
            connection.send(Lookup(ids=np.zeros(1000)))
        connection.send(Lookup(ids=np.zeros(10)))
        assert isinstance(await inbox.next(), Lookup)
        await connection.close()


async def test_messages_sent_together_are_written_in_one_piece() -> None:
    inbox, wire = Inbox(), Tape()
    handshake = CoordinatorHandshake(SECRET, "", "c")
    connection = Connection(handshake, inbox.messages.put_nowait, inbox.ended.set_result, Limits())
    connection.connection_made(wire)
    connection.send(Lookup(ids=np.zeros(1)), Lookup(ids=np.zeros(2)), Lookup(ids=np.zeros(3)))
    hello, piece = wire.pieces
    assert connection.bytes_sent == len(hello) + len(piece)
    received = [decode(body) for body in FrameBuffer(1 << 20).feed(piece)]
    assert [len(message.ids) for message in received if isinstance(message, Lookup)] == [1, 2, 3]
    wire.socket.close()


async def test_messages_before_one_over_the_limit_are_sent() -> None:
    async with echo() as running:
        inbox = Inbox()
        connection = await open_to(running.port, inbox, limits=Limits(frame=1000))
        with pytest.raises(FrameTooLarge):
            connection.send(Lookup(ids=np.zeros(1)), Lookup(ids=np.zeros(1000)))
        connection.send(Lookup(ids=np.zeros(2)))
        received = [await inbox.next() for _ in range(2)]
        assert [len(message.ids) for message in received if isinstance(message, Lookup)] == [1, 2]
        await connection.close()


async def test_a_model_that_does_not_read_is_a_stalled_peer() -> None:
    async with misbehaving("deaf") as model:
        inbox = Inbox()
        connection = await open_to(model.port, inbox, limits=Limits(unsent=1 << 16, farewell_s=0.05))
        with pytest.raises(PeerStalled):
            flood(connection)
        assert isinstance(await inbox.end(), PeerStalled)


async def test_a_frame_that_was_tampered_with_ends_the_connection() -> None:
    async with misbehaving("tamperer") as model:
        inbox = Inbox()
        await open_to(model.port, inbox)
        reason = await inbox.end()
        assert isinstance(reason, WireError)
        assert reason.code == "tampered"
        assert inbox.messages.empty()


async def test_a_models_failure_is_reported_when_the_connection_ends() -> None:
    async with echo() as running:
        connection, inbox = await running.connect()
        connection.send(Hello(1, b"", "", ""))  # the server sends it back
        assert isinstance(await inbox.next(), Hello)
        (peer,) = running.server.peers
        peer.fail(RemoteFailure("some_code", "for a person"))
        reason = await inbox.end()
        assert isinstance(reason, RemoteFailure)
        assert (reason.code, str(reason)) == ("some_code", "for a person")


async def test_a_model_without_the_secret_learns_no_proof() -> None:
    async with misbehaving("impostor") as model:
        with pytest.raises(HandshakeRefused) as refused:
            await open_to(model.port)
        assert refused.value.code == "unauthenticated"


async def test_a_cancelled_open_leaves_no_connection() -> None:
    async with misbehaving("mute") as model:
        opening = asyncio.ensure_future(open_to(model.port))
        await asyncio.wait_for(model.hello.wait(), HANG_S)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        await asyncio.wait_for(model.hung_up.wait(), HANG_S)


class Tape(asyncio.Transport):
    """A transport that records each write."""

    def __init__(self) -> None:
        self.socket = socket.socket()
        super().__init__({"socket": self.socket})
        self.pieces: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.pieces.append(bytes(data))

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """This transport has no buffer."""

    def get_write_buffer_size(self) -> int:
        return 0


def flood(connection: Connection) -> None:
    for _ in range(10_000):
        connection.send(Lookup(ids=np.zeros(10_000)))


async def open_to(
    port: int, inbox: Inbox | None = None, deadline_s: float = 5.0, limits: Limits | None = None
) -> Connection:
    inbox = inbox or Inbox()
    return await Connection.open(
        "127.0.0.1",
        port,
        SECRET,
        on_message=inbox.messages.put_nowait,
        on_closed=inbox.ended.set_result,
        deadline_s=deadline_s,
        limits=limits or Limits(farewell_s=0.05),
    )


@dataclass
class ModelByHand:
    """A model that misbehaves: mute sends nothing, the impostor does not know the secret, deaf reads nothing after its
    Welcome, the tamperer flips a bit of its frames."""

    behaviour: Literal["mute", "impostor", "deaf", "tamperer"]
    port: int = 0
    hello: asyncio.Event = field(default_factory=asyncio.Event)
    hung_up: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello = await next_message(reader)
        assert isinstance(hello, Hello)
        self.hello.set()
        if self.behaviour == "mute":
            await reader.read()
            self.hung_up.set()
        else:
            secret = b"another secret altogether" if self.behaviour == "impostor" else SECRET
            handshake = ModelHandshake(secret, "g-1", hello)
            writer.write(frame(encode(handshake.challenge), None, 1 << 20))
            if self.behaviour != "impostor":
                await self.welcome(handshake, reader, writer)
        await self.over.wait()
        writer.close()

    async def welcome(
        self, handshake: ModelHandshake, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        proof = await next_message(reader)
        assert isinstance(proof, Proof)
        handshake.verify(proof)
        outgoing, _ = handshake.seals()
        writer.write(frame(encode(WELCOME), outgoing, 1 << 20))
        if self.behaviour == "tamperer":
            answer = bytearray(frame(encode(Lookup()), outgoing, 1 << 20))
            answer[-1] ^= 1
            writer.write(answer)


async def next_message(reader: asyncio.StreamReader) -> Message:
    (length,) = HEADER.unpack(await reader.readexactly(HEADER.size))
    return decode(await reader.readexactly(length))


@asynccontextmanager
async def misbehaving(behaviour: Literal["mute", "impostor", "deaf", "tamperer"]) -> AsyncIterator[ModelByHand]:
    model = ModelByHand(behaviour)
    server = await asyncio.start_server(model.serve, "127.0.0.1", 0)
    model.port = server.sockets[0].getsockname()[1]
    try:
        yield model
    finally:
        model.over.set()
        server.close()
