"""The common base of both ends of a connection: frames in and out, limits, keep-alive and closing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from actors.wire.errors import ConnectionLost, PeerSilent, PeerStalled, RemoteFailure, WireError
from actors.wire.framing import FrameBuffer, Seal, frame
from actors.wire.messages import Failure, Message, Ping, ProtocolError, decode, encode

log = logging.getLogger(__name__)

_PINGS = 5  # per `Limits.peer_timeout_s`


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a connection, in bytes and seconds."""

    frame: int = 64 << 20  # the longest frame accepted or sent
    stranger_frame: int = 4 << 10  # the same during the handshake
    unsent: int = 256 << 20  # a connection with more unsent bytes is closed
    strangers: int = 128  # unauthenticated connections; more are closed at once
    handshake_s: float = 5.0
    stall_s: float = 30.0  # a connection whose write buffer stays full for so long is closed
    peer_timeout_s: float = 15.0  # an authenticated connection that receives nothing for so long is closed
    farewell_s: float = 1.0  # longest time for the last frames of a closing connection


class Link(asyncio.Protocol, ABC):
    """One end of a connection. It runs on the event loop's thread and never blocks."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.bytes_sent = 0  # framing included
        self.bytes_received = 0
        self.closing = False
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reason: Exception | None = None
        self._frames = FrameBuffer(limits.stranger_frame)
        self._outgoing: Seal | None = None
        self._incoming: Seal | None = None
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None  # of the handshake, later of closing
        self._stall: asyncio.TimerHandle | None = None
        self._pulse: asyncio.TimerHandle | None = None
        self._silent_pulses = 0

    @abstractmethod
    def _message(self, message: Message) -> None:
        """Handle a message. A WireError or ProtocolError that it raises closes the connection."""

    @abstractmethod
    def _opened(self) -> None:
        """Called when the transport is connected."""

    @abstractmethod
    def _ended(self, reason: Exception | None) -> None:
        """Called when the connection has ended. reason: None if this end closed it without an error."""

    def send(self, *messages: Message) -> None:
        """Write messages to the transport at once, in one piece, so that the peer wakes up once.

        Raises ConnectionLost, PeerStalled or FrameTooLarge. Messages before the one that is too large are sent.
        """
        if self.closing or self._transport is None:
            raise ConnectionLost("the connection is closed")
        frames: list[bytes] = []
        try:
            for message in messages:
                frames.append(frame(encode(message), self._outgoing, self._frames.limit))
        finally:
            self._write(self._transport, b"".join(frames))

    def _write(self, transport: asyncio.Transport, data: bytes) -> None:
        transport.write(data)
        self.bytes_sent += len(data)
        if transport.get_write_buffer_size() > self.limits.unsent:
            stalled = PeerStalled(f"the peer left more than {self.limits.unsent} bytes unread")
            self._abort(stalled)
            raise stalled

    def fail(self, error: Exception) -> None:
        """Send the error to the peer and close. Handlers of messages may call it too."""
        if self.closing:
            return
        if isinstance(error, WireError):
            failure = Failure(error.code, str(error))
        elif isinstance(error, ProtocolError):
            failure = Failure("protocol", str(error))
        else:
            failure = Failure("internal", "the message could not be handled; the log of the process says why")
        try:
            self.send(failure)
        except WireError as unsent:
            log.debug("the failure %s was not sent: %s", failure.code, unsent)
        self.hang_up(error)

    def hang_up(self, reason: Exception | None = None) -> None:
        """Close after the written data is delivered, or after `farewell_s` at the latest."""
        if self.closing:
            return
        self.closing, self._reason = True, reason
        if self._transport is None or self._transport.is_closing():
            return
        self._expire(self.limits.farewell_s, self._transport.abort)
        if self._transport.can_write_eof():  # closing with bytes unread would reset what was just written
            self._transport.write_eof()
        else:
            self._transport.close()

    def upgrade(self, outgoing: Seal, incoming: Seal) -> None:
        """The peer is authenticated: seal frames unless TLS is used, raise the frame limit, cancel the deadline."""
        assert self._transport is not None
        if self._transport.get_extra_info("ssl_object") is None:
            self._outgoing, self._incoming = outgoing, incoming
        self._frames.limit = self.limits.frame
        cancel(self._deadline)
        self._schedule_pulse()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=min(1 << 20, self.limits.unsent))
        keep_alive(self._transport.get_extra_info("socket"))
        self._opened()

    def data_received(self, data: bytes) -> None:
        if self.closing:
            return
        self.bytes_received += len(data)
        try:
            self._receive(data)
        except (WireError, ProtocolError) as error:
            self.fail(error)
        except Exception as error:
            log.exception("a message could not be handled")
            self.fail(error)

    def connection_lost(self, exc: Exception | None) -> None:
        cancel(self._deadline)
        cancel(self._stall)
        cancel(self._pulse)
        if not self.closing:
            self._reason = ConnectionLost(str(exc or "the peer closed the connection"))
        self.closing = True
        self.closed.set_result(None)
        self._ended(self._reason)

    def pause_writing(self) -> None:
        self._stall = asyncio.get_running_loop().call_later(self.limits.stall_s, self._stalled)

    def resume_writing(self) -> None:
        cancel(self._stall)

    def _receive(self, data: bytes) -> None:
        for body in self._frames.feed(data):
            if self.closing:  # an earlier frame of this data ended the connection
                return
            message = decode(self._incoming.open(body) if self._incoming else body)
            if isinstance(message, Failure):
                self.hang_up(RemoteFailure(message.code, message.message))
            elif not (isinstance(message, Ping) and self._pulse is not None):
                self._message(message)

    def _schedule_pulse(self) -> None:
        pause, loop = self.limits.peer_timeout_s / _PINGS, asyncio.get_running_loop()
        self._pulse = loop.call_later(pause, self._pulse_due, self.bytes_sent, self.bytes_received)

    def _pulse_due(self, sent: int, received: int) -> None:
        """Send a Ping if nothing else was sent since the last call, and close the connection if the peer is silent.

        Silence is measured in calls rather than seconds, so that a pause of this process does not count.
        """
        if self.closing:
            return
        self._silent_pulses = self._silent_pulses + 1 if received == self.bytes_received else 0
        if self._silent_pulses >= _PINGS:
            self._abort(PeerSilent(f"the peer sent nothing for {self.limits.peer_timeout_s:g} s"))
            return
        if sent == self.bytes_sent:
            with contextlib.suppress(WireError):  # the connection is closed then, and `_ended` is called
                self.send(Ping())
        self._schedule_pulse()

    def _abort(self, reason: Exception) -> None:
        assert self._transport is not None
        self.closing, self._reason = True, reason
        self._transport.abort()

    def _stalled(self) -> None:
        self._abort(PeerStalled(f"the peer read nothing for {self.limits.stall_s} s"))

    def _expire(self, seconds: float, then: Callable[[], None]) -> None:
        cancel(self._deadline)
        self._deadline = asyncio.get_running_loop().call_later(seconds, then)


def cancel(handle: asyncio.Handle | None) -> None:
    """Cancel a timer, if there is one."""
    if handle is not None:
        handle.cancel()


def keep_alive(sock: socket.socket) -> None:
    """Send small frames at once, and detect within about 25 s that the peer's machine is down."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
