"""Messages survive encoding. Anything else is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgpack
import numpy as np
import pytest

from actors.wire.messages import (
    EXTEND_ITEM,
    MESSAGES,
    ROWS_ITEM,
    Extend,
    Forked,
    Hello,
    Message,
    ProtocolError,
    Refusal,
    Refused,
    Rows,
    Welcome,
    decode,
    encode,
)

EXAMPLES: list[Message] = [
    Hello(1, b"nonce", "incarnation", "peer"),
    Welcome("target", "abc", 152_064, 2**64 - 1, 65_536, 4_096, True, "gpu-1 gpu-2"),
    Extend(
        np.array([(1, 2, 3, 2**64 - 1, 4, 5, 2, 1, 128, 1, 2, 0.5)], EXTEND_ITEM),
        np.array([7, 8], "<i4"),
        np.array([9], "<i4"),
        np.array([2**63], "<u8"),
    ),
    Rows(
        np.array([(1, 1, 2, 0)], ROWS_ITEM),
        np.array([0.5], "<f4"),
        np.array([0.7], "<f4"),
        np.array([3, 1], "<u2"),
        np.array([1, 1], "<u2"),
        np.ones(2, "<f4"),
    ),
    Forked(np.array([(7, 32)], Forked().items.dtype)),
    Refused(np.array([(1, Refusal.KV_MISS, 12)], Refused().items.dtype)),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_messages_survive_encoding(message: Message) -> None:
    back = decode(encode(message))
    assert type(back) is type(message)
    for field in dataclasses.fields(message):
        np.testing.assert_array_equal(getattr(back, field.name), getattr(message, field.name))


def test_every_tag_names_one_kind_of_message() -> None:
    assert [kind.tag for kind in MESSAGES.values()] == list(MESSAGES)


@pytest.mark.parametrize(
    "parts",
    [
        None,
        [],
        [99],
        [True],
        ["Extend"],
        [1, 1, b"nonce", "incarnation"],  # a field is missing
        [1, "1", b"nonce", "incarnation", "peer"],  # a number as text
        [1, True, b"nonce", "incarnation", "peer"],  # a flag for a number
        [5, b"x" * 7, b"", b"", b"", b""],  # half an item
        [5, [1, 2], b"", b"", b"", b""],  # a list for a column
    ],
)
def test_an_invalid_message_is_a_protocol_error(parts: Any) -> None:
    with pytest.raises(ProtocolError):
        decode(msgpack.packb(parts))


def test_garbage_is_a_protocol_error() -> None:
    for body in (b"", b"\xc1", b"\xdd\xff\xff\xff\xff", np.random.default_rng(0).bytes(256)):
        with pytest.raises(ProtocolError):
            decode(body)


def test_an_extend_of_one_session_is_small() -> None:
    assert len(encode(EXAMPLES[2])) < 100
