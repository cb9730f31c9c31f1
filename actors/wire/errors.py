"""What can go wrong on a connection, each with the stable code that a `Failure` frame carries."""

from __future__ import annotations


class WireError(Exception):
    """A connection that failed. `code` is stable; the text is for a person."""

    code = "wire"


class HandshakeRefused(WireError):
    """The other end did not accept this one, or could not prove itself.

    `code` says which: `unauthenticated` (the secrets differ), `wrong_incarnation` (another process answers at that
    address: ask the directory again), `wrong_protocol` (mixed versions), `handshake_timeout`.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class TooManyStrangers(WireError):
    """So many connections have not proved themselves yet that another is not taken."""

    code = "strangers"


class ConnectionLost(WireError):
    """The connection is gone. Open another and extend again: sessions are re-sent, nothing is lost."""

    code = "lost"


class RemoteFailure(WireError):
    """The other end closed the connection and said why."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class FrameTooLarge(WireError):
    """A frame is longer than the limit of this connection. Send fewer rows or a smaller k in one frame."""

    code = "frame_too_large"


class FrameTampered(WireError):
    """A frame's MAC does not fit: altered, replayed, dropped or out of order on the way."""

    code = "tampered"


class PeerStalled(WireError):
    """The other end does not read what it is sent."""

    code = "stalled"


class PeerSilent(WireError):
    """The other end says nothing at all: it hangs, or the way to it is cut."""

    code = "silent"
