"""The listening end: a model replica that accepts connections of coordinators."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections import Counter
from collections.abc import Callable

from actors.wire.errors import (
    ConnectionLost,
    FrameTampered,
    FrameTooLarge,
    HandshakeRefused,
    RemoteFailure,
    TooManyStrangers,
    WireError,
)
from actors.wire.handshake import ModelHandshake, checked_secret
from actors.wire.link import Limits, Link
from actors.wire.messages import Hello, Message, Proof, ProtocolError, Welcome

log = logging.getLogger(__name__)

FORBIDDEN = (ProtocolError, FrameTampered, FrameTooLarge)  # errors by which a peer's data ends its connection
REPORT_S = 10.0  # refused connections are counted, and logged at most this often


class Server:
    """Accepts peers that know the secret, and passes on their messages.

    `on_message(peer, message)` and `on_closed(peer)` run on the event loop's thread and must not block. If `on_message`
    raises ProtocolError, only that peer is closed, with a Failure.
    """

    def __init__(
        self,
        secret: bytes,
        welcome: Welcome,
        on_message: Callable[[Peer, Message], None],
        on_closed: Callable[[Peer], None],
        *,
        tls: ssl.SSLContext | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.secret = checked_secret(secret)
        self.welcome = welcome
        self.on_message = on_message
        self.on_closed = on_closed
        self.limits = limits or Limits()
        self.links: set[Peer] = set()
        self.refused: Counter[str] = Counter()  # number of connections by the code of the error that ended them
        self._reported, self._report_at = 0, float("-inf")
        self._tls = tls
        self._listener: asyncio.Server | None = None

    @property
    def peers(self) -> list[Peer]:
        """The authenticated connections."""
        return [link for link in self.links if link.authenticated]

    @property
    def strangers(self) -> int:
        """Number of unauthenticated connections."""
        return sum(not link.authenticated for link in self.links)

    def refuse(self, peer: str, reason: Exception) -> None:
        """Count a refused connection, or one that ended by its own data. Logs rarely, so that attacks fill no log."""
        self.refused[code_of(reason)] += 1
        now, all_ = time.monotonic(), self.refused.total()
        if now >= self._report_at:
            log.warning("refused %d connections, the last of %s: %s", all_ - self._reported, peer, code_of(reason))
            self._reported, self._report_at = all_, now + REPORT_S

    async def start(self, host: str, port: int = 0) -> int:
        """Listen on one address. Returns the port (a free one for 0)."""
        timeout = self.limits.handshake_s if self._tls else None
        self._listener = await asyncio.get_running_loop().create_server(
            lambda: Peer(self), host, port, ssl=self._tls, ssl_handshake_timeout=timeout
        )
        bound: int = self._listener.sockets[0].getsockname()[1]
        return bound

    async def close(self) -> None:
        """Stop listening and close every connection, within twice `limits.farewell_s`."""
        if self._listener is not None:
            self._listener.close()
        links = list(self.links)
        for link in links:
            link.hang_up()
        if links:
            await asyncio.wait([link.closed for link in links], timeout=2 * self.limits.farewell_s)


class Peer(Link):
    """A coordinator's connection, at the model."""

    def __init__(self, server: Server) -> None:
        super().__init__(server.limits)
        self._server = server
        self._handshake: ModelHandshake | None = None
        self.authenticated = False
        self.name = ""  # the name in the coordinator's Hello

    def send(self, *messages: Message) -> None:
        """Send in one piece. Raises nothing if the peer is lost or does not read: then `on_closed` is called."""
        if self.closing:
            return
        try:
            super().send(*messages)
        except WireError as error:
            self.fail(error)

    def _opened(self) -> None:
        if self._server.strangers >= self.limits.strangers:
            self._abort(TooManyStrangers(f"{self.limits.strangers} connections have not proved themselves yet"))
            return
        self._server.links.add(self)
        self._expire(self.limits.handshake_s, self._handshake_expired)

    def _message(self, message: Message) -> None:
        if self.authenticated:
            self._server.on_message(self, message)
        elif self._handshake is None and isinstance(message, Hello):
            self._handshake = ModelHandshake(self._server.secret, self._server.welcome.incarnation, message)
            self.send(self._handshake.challenge)
        elif self._handshake is not None and isinstance(message, Proof):
            self._accept(self._handshake, message)
        else:
            raise ProtocolError(f"{type(message).__name__} does not belong here in a handshake")

    def _accept(self, handshake: ModelHandshake, proof: Proof) -> None:
        handshake.verify(proof)
        self.upgrade(*handshake.seals())
        handshake.check_incarnation()
        self.name, self.authenticated = handshake.hello.peer, True
        self.send(self._server.welcome)

    def _handshake_expired(self) -> None:
        self.fail(HandshakeRefused("handshake_timeout", f"no handshake within {self.limits.handshake_s} s"))

    def _ended(self, reason: Exception | None) -> None:
        self._server.links.discard(self)
        if not self.authenticated or isinstance(reason, FORBIDDEN):
            self._server.refuse(self.name or "a stranger", reason or ConnectionLost("closed before it proved itself"))
        elif reason is not None:
            log.info("connection of %s ended: %s", self.name, reason)
        if self.authenticated:
            self._server.on_closed(self)


def code_of(reason: Exception) -> str:
    """The stable code of an error. It never has a peer's own text."""
    if isinstance(reason, RemoteFailure):
        return "remote"
    if isinstance(reason, WireError):
        return reason.code
    return "protocol" if isinstance(reason, ProtocolError) else "internal"
