"""Frames, their limits and their MACs."""

import pytest

from actors.wire.errors import FrameTampered, FrameTooLarge
from actors.wire.framing import HEADER, MAC_BYTES, FrameBuffer, Seal, frame

KEY = b"k" * 32


def test_frames_survive_any_cut_of_the_stream() -> None:
    bodies = [b"", b"a", b"bc" * 500]
    stream = b"".join(frame(body, None, 1 << 20) for body in bodies)
    for size in (1, 3, 7, len(stream)):
        buffer = FrameBuffer(1 << 20)
        pieces = (stream[i : i + size] for i in range(0, len(stream), size))
        assert [body for piece in pieces for body in buffer.feed(piece)] == bodies


def test_a_length_above_the_limit_is_refused_before_its_body_arrives() -> None:
    with pytest.raises(FrameTooLarge):
        list(FrameBuffer(10).feed(HEADER.pack(11)))


def test_a_frame_over_the_limit_is_not_sent_and_not_numbered() -> None:
    sender, receiver = Seal(KEY), Seal(KEY)
    with pytest.raises(FrameTooLarge):
        frame(b"x" * 100, sender, 100)
    sealed = frame(b"short", sender, 100)
    assert receiver.open(sealed[HEADER.size :]) == b"short"


def test_the_limit_may_rise_between_two_frames() -> None:
    buffer = FrameBuffer(4)
    frames = buffer.feed(frame(b"abc", None, 99) + frame(b"x" * 50, None, 99))
    assert next(frames) == b"abc"
    buffer.limit = 50
    assert next(frames) == b"x" * 50


@pytest.mark.parametrize("place", [0, 3, -1, -MAC_BYTES])
def test_a_flipped_bit_anywhere_in_a_sealed_frame_is_detected(place: int) -> None:
    sealed = bytearray(frame(b"body", Seal(KEY), 99)[HEADER.size :])
    sealed[place] ^= 1
    with pytest.raises(FrameTampered):
        Seal(KEY).open(bytes(sealed))


def test_replayed_dropped_and_truncated_frames_are_detected() -> None:
    sender = Seal(KEY)
    first, second = (frame(b"body", sender, 99)[HEADER.size :] for _ in range(2))
    replayed = Seal(KEY)
    assert replayed.open(first) == b"body"
    for receiver, arrived in ((replayed, first), (Seal(KEY), second), (Seal(KEY), first[:-1]), (Seal(KEY), b"")):
        with pytest.raises(FrameTampered):
            receiver.open(arrived)
