"""The connecting end: a coordinator's connection to one model replica."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable

from actors.wire.errors import ConnectionLost, HandshakeRefused, RemoteFailure
from actors.wire.handshake import CoordinatorHandshake
from actors.wire.link import Limits, Link
from actors.wire.messages import Challenge, Message, ProtocolError, Welcome


class Connection(Link):
    """An open connection to a model replica, created by `open`.

    `send` writes at once and never waits. It raises ConnectionLost, FrameTooLarge or PeerStalled. `bytes_sent` and
    `bytes_received` include framing and handshake.
    """

    welcome: Welcome

    def __init__(
        self,
        handshake: CoordinatorHandshake,
        on_message: Callable[[Message], None],
        on_closed: Callable[[Exception | None], None],
        limits: Limits,
    ) -> None:
        super().__init__(limits)
        self._handshake = handshake
        self._on_message = on_message
        self._on_closed = on_closed
        self._proved = False
        self._ready: asyncio.Future[Welcome] = asyncio.get_running_loop().create_future()

    @classmethod
    async def open(
        cls,
        host: str,
        port: int,
        secret: bytes,
        *,
        on_message: Callable[[Message], None],
        on_closed: Callable[[Exception | None], None],
        incarnation: str = "",
        peer: str = "",
        deadline_s: float = 5.0,
        tls: ssl.SSLContext | None = None,
        limits: Limits | None = None,
    ) -> Connection:
        """Connect and authenticate. Raises HandshakeRefused, or ConnectionLost if there is no answer in `deadline_s`.

        `incarnation` identifies the expected process ("" accepts any). `on_message` and `on_closed` run on the event
        loop's thread. `on_closed` is called once if the connection opened, with None if `close` ended it.
        """
        handshake = CoordinatorHandshake(secret, incarnation, peer)
        link: Connection | None = None

        def make() -> Connection:
            nonlocal link
            link = cls(handshake, on_message, on_closed, limits or Limits())
            return link

        try:
            async with asyncio.timeout(deadline_s):
                _, link = await asyncio.get_running_loop().create_connection(make, host, port, ssl=tls)
                link.welcome = await link._ready
        except TimeoutError:
            raise ConnectionLost(f"no answer from {host}:{port} within {deadline_s} s") from None
        except OSError as error:
            raise ConnectionLost(f"no connection to {host}:{port}: {error}") from error
        finally:
            if link is not None and not link.authenticated:
                link.hang_up()
        return link

    @property
    def authenticated(self) -> bool:
        """True once the handshake is complete."""
        return self._ready.done() and not self._ready.cancelled() and self._ready.exception() is None

    async def close(self) -> None:
        """Deliver the written data and close. `on_closed(None)` has run when this returns."""
        self.hang_up()
        await asyncio.wait([self.closed], timeout=2 * self.limits.farewell_s)

    def _opened(self) -> None:
        self.send(self._handshake.hello)

    def _message(self, message: Message) -> None:
        if self.authenticated:
            self._on_message(message)
        elif isinstance(message, Challenge) and not self._proved:
            proof = self._handshake.answer(message)
            self._proved = True
            self.send(proof)
            self.upgrade(*self._handshake.seals())
        elif isinstance(message, Welcome) and self._proved:
            self._ready.set_result(message)
        else:
            raise ProtocolError(f"{type(message).__name__} does not belong here in a handshake")

    def _ended(self, reason: Exception | None) -> None:
        if self.authenticated:
            self._on_closed(reason)
        elif not self._ready.done():
            if isinstance(reason, RemoteFailure):
                reason = HandshakeRefused(reason.code, str(reason))
            self._ready.set_exception(reason or ConnectionLost("the connection closed during the handshake"))
