"""Both ends of a connection for tests, and a bare socket that sends frames by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from actors.wire.client import Connection
from actors.wire.framing import HEADER, FrameBuffer, Seal, frame
from actors.wire.handshake import CoordinatorHandshake
from actors.wire.link import Limits
from actors.wire.messages import Challenge, Message, Welcome, decode, encode
from actors.wire.server import Peer, Server
from tests.support.deadlines import HANG_S

SECRET = b"a secret of the whole application"
WELCOME = Welcome(
    role="guider",
    incarnation="g-1",
    width=32,
    hash_seed=7,
    cache_tokens=64,
    max_position=64,
    batch_invariant=True,
    devices="card",
)


@dataclass
class Inbox:
    """The messages that one end received, and how its connection ended."""

    messages: asyncio.Queue[Message] = field(default_factory=asyncio.Queue)
    ended: asyncio.Future[Exception | None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    async def next(self) -> Message:
        return await asyncio.wait_for(self.messages.get(), HANG_S)

    async def end(self) -> Exception | None:
        return await asyncio.wait_for(asyncio.shield(self.ended), HANG_S)


@dataclass
class Echo:
    """A server that sends every message back."""

    limits: Limits = field(default_factory=Limits)
    disconnected: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    received: list[Message] = field(default_factory=list)
    port: int = 0

    def __post_init__(self) -> None:
        self.server = Server(
            SECRET, WELCOME, self._echo, lambda peer: self.disconnected.put_nowait(peer.name), limits=self.limits
        )

    def _echo(self, peer: Peer, message: Message) -> None:
        self.received.append(message)
        peer.send(message)

    async def connect(self, secret: bytes = SECRET, incarnation: str = "", name: str = "c") -> tuple[Connection, Inbox]:
        inbox = Inbox()
        connection = await Connection.open(
            "127.0.0.1",
            self.port,
            secret,
            incarnation=incarnation,
            peer=name,
            on_message=inbox.messages.put_nowait,
            on_closed=inbox.ended.set_result,
        )
        return connection, inbox


@asynccontextmanager
async def echo(limits: Limits | None = None) -> AsyncIterator[Echo]:
    """A running echo server on the loopback interface."""
    running = Echo(limits or Limits())
    running.port = await running.server.start("127.0.0.1")
    try:
        yield running
    finally:
        await running.server.close()


@dataclass
class Bare:
    """A socket that sends any bytes and splits the received ones into frames."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    outgoing: Seal | None = None
    incoming: Seal | None = None

    @classmethod
    async def connect(cls, port: int) -> Bare:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def write(self, data: bytes) -> None:
        self.writer.write(data)

    def send(self, message: Message) -> bytes:
        """Send a well-formed message. Returns its bytes."""
        data = frame(encode(message), self.outgoing, FrameBuffer(1 << 30).limit)
        self.write(data)
        return data

    async def next(self) -> Message:
        (length,) = HEADER.unpack(await asyncio.wait_for(self.reader.readexactly(HEADER.size), HANG_S))
        body = await asyncio.wait_for(self.reader.readexactly(length), HANG_S)
        return decode(self.incoming.open(body) if self.incoming else body)

    async def at_end(self) -> bool:
        """True if the server closed the connection and sent nothing more."""
        return await asyncio.wait_for(self.reader.read(1), HANG_S) == b""

    async def shake_hands(self) -> Message:
        """Authenticate. Returns the Welcome or Failure."""
        handshake = CoordinatorHandshake(SECRET, "", "bare")
        self.send(handshake.hello)
        challenge = await self.next()
        assert isinstance(challenge, Challenge)
        self.send(handshake.answer(challenge))
        self.outgoing, self.incoming = handshake.seals()
        return await self.next()

    async def close(self) -> None:
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except ConnectionError:
            return
