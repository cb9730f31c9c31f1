"""Frames: a 4-byte little-endian length, the body and, without TLS, a MAC. This module does no I/O."""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterator

from actors.wire.errors import FrameTampered, FrameTooLarge

HEADER = struct.Struct("<I")
COUNTER = struct.Struct("<Q")
MAC_BYTES = 16


class Seal:
    """The MACs of one direction of a connection: keyed BLAKE2b of the frame's number and body.

    Both ends count the frames, and the number is never sent. So the MAC is wrong for a frame that was altered, replayed
    or reordered, and for every frame after a dropped one.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._frames = 0

    def seal(self, body: bytes) -> bytes:
        """The MAC of the next frame."""
        mac = hashlib.blake2b(COUNTER.pack(self._frames), key=self._key, digest_size=MAC_BYTES)
        mac.update(body)
        self._frames += 1
        return mac.digest()

    def open(self, frame: bytes) -> bytes:
        """The body of the next frame. Raises FrameTampered."""
        body = frame[:-MAC_BYTES]
        if not hmac.compare_digest(self.seal(body), frame[-MAC_BYTES:]):
            raise FrameTampered("the MAC of a frame does not fit: it was altered, replayed or dropped on the way")
        return body


def frame(body: bytes, seal: Seal | None, limit: int) -> bytes:
    """The frame of a message's body. Raises FrameTooLarge before it copies anything."""
    length = len(body) + (MAC_BYTES if seal else 0)
    if length > limit:
        raise FrameTooLarge(f"a frame of {length} bytes is longer than the {limit} bytes allowed")
    return b"".join((HEADER.pack(length), body, seal.seal(body) if seal else b""))


class FrameBuffer:
    """Splits a stream of bytes into frames. `limit`, in bytes per frame, may be raised between two frames."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The frames that `data` completes, without their lengths. Raises FrameTooLarge as soon as a length is read."""
        self._bytes += data
        while len(self._bytes) >= HEADER.size:
            (length,) = HEADER.unpack_from(self._bytes)
            if length > self.limit:
                raise FrameTooLarge(f"a frame of {length} bytes is longer than the {self.limit} bytes allowed")
            end = HEADER.size + length
            if len(self._bytes) < end:
                return
            with memoryview(self._bytes) as view:
                whole = bytes(view[HEADER.size : end])
            del self._bytes[:end]
            yield whole
