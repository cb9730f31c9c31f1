"""Errors of connections. Each has a stable code, which the `Failure` frame carries."""

from __future__ import annotations


class WireError(Exception):
    """A connection failed. `code` is stable; the message is for people."""

    code = "wire"


class HandshakeRefused(WireError):
    """One end refused the other during the handshake.

    Codes: `unauthenticated` (the secrets differ), `wrong_incarnation` (another process listens at that address: read
    the directory again), `wrong_protocol` (versions differ), `handshake_timeout`.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class TooManyStrangers(WireError):
    """Too many unauthenticated connections are open, so another one is refused."""

    code = "strangers"


class ConnectionLost(WireError):
    """The connection was lost. Connect again and send the sessions' tokens again: nothing else is lost."""

    code = "lost"


class RemoteFailure(WireError):
    """The other end closed the connection and sent its reason."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class FrameTooLarge(WireError):
    """A frame exceeds the limit of this connection. Send fewer rows, or a smaller k, in one frame."""

    code = "frame_too_large"


class FrameTampered(WireError):
    """A frame's MAC is wrong: a frame was altered, replayed, dropped or reordered on the way."""

    code = "tampered"


class PeerStalled(WireError):
    """The other end does not read its data."""

    code = "stalled"


class PeerSilent(WireError):
    """The other end sends nothing at all: it hangs, or the network is cut."""

    code = "silent"
