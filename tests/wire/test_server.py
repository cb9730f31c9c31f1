"""The listening end, against coordinators and bare sockets."""

import asyncio

import msgpack
import numpy as np
import pytest

from actors.wire.framing import HEADER, Seal, frame
from actors.wire.handshake import CoordinatorHandshake
from actors.wire.link import Limits
from actors.wire.messages import (
    Challenge,
    Extend,
    Failure,
    Hello,
    Lookup,
    Message,
    Proof,
    ProtocolError,
    Welcome,
    encode,
)
from actors.wire.server import Peer, Server
from tests.support.deadlines import HANG_S
from tests.support.wire_peers import SECRET, WELCOME, Bare, Echo, echo


def lookup(ids: int = 3) -> Lookup:
    return Lookup(ids=np.arange(ids, dtype=np.int32))


async def failure_of(bare: Bare) -> str:
    """The code of the Failure that a bare socket receives before it is closed."""
    failure = await bare.next()
    assert isinstance(failure, Failure)
    assert await bare.at_end()
    await bare.close()
    return failure.code


async def good_peer_is_well(running: Echo) -> None:
    connection, inbox = await running.connect(name="good")
    connection.send(lookup())
    assert isinstance(await inbox.next(), Lookup)
    await connection.close()


async def test_the_handshake_is_answered_with_a_welcome_and_messages_flow() -> None:
    async with echo() as running:
        bare = await Bare.connect(running.port)
        welcome = await bare.shake_hands()
        assert isinstance(welcome, Welcome)
        assert (welcome.incarnation, welcome.width) == (WELCOME.incarnation, WELCOME.width)
        bare.send(lookup())
        assert isinstance(await bare.next(), Lookup)
        assert [peer.name for peer in running.server.peers] == ["bare"]
        await bare.close()
        assert await asyncio.wait_for(running.disconnected.get(), HANG_S) == "bare"


@pytest.mark.parametrize(
    "first",
    [
        frame(b"\x93\x01\x02", None, 99),
        frame(msgpack.packb([99, 1]), None, 99),
        frame(encode(lookup()), None, 99),
        frame(encode(Proof(b"x" * 32)), None, 99),
        b"GET / HTTP/1.1\r\nHost: model\r\n\r\n",
        HEADER.pack(5000),
        bytes(64),
    ],
    ids=["garbage", "unknown tag", "message before hello", "proof before hello", "http", "oversized", "zeros"],
)
async def test_an_unauthenticated_peer_gets_a_typed_failure_and_does_no_harm(first: bytes) -> None:
    async with echo() as running:
        connection, inbox = await running.connect(name="good")
        stranger = await Bare.connect(running.port)
        stranger.write(first)
        assert await failure_of(stranger) in ("protocol", "frame_too_large")
        connection.send(lookup())
        assert isinstance(await inbox.next(), Lookup)
        assert len(running.received) == 1
        await connection.close()
        assert await asyncio.wait_for(running.disconnected.get(), HANG_S) == "good"


async def test_a_wrong_and_a_replayed_proof_are_unauthenticated() -> None:
    async with echo() as running:
        handshake = CoordinatorHandshake(SECRET, "", "honest")
        honest = await Bare.connect(running.port)
        honest.send(handshake.hello)
        challenge = await honest.next()
        assert isinstance(challenge, Challenge)
        for proof in (handshake.answer(challenge), Proof(challenge.proof), Proof(b"")):
            replayer = await Bare.connect(running.port)
            replayer.send(handshake.hello)
            assert isinstance(await replayer.next(), Challenge)
            replayer.send(proof)
            assert await failure_of(replayer) == "unauthenticated"
        await honest.close()
        await good_peer_is_well(running)


async def test_an_unfinished_handshake_is_closed_at_the_deadline() -> None:
    async with echo(Limits(handshake_s=0.05)) as running:
        silent, slow = await Bare.connect(running.port), await Bare.connect(running.port)
        hello = frame(encode(CoordinatorHandshake(SECRET, "", "slow").hello), None, 999)
        slow.write(hello[:-1])
        for stranger in (silent, slow):
            assert await failure_of(stranger) == "handshake_timeout"


async def test_flipped_replayed_and_missing_frames_close_the_connection() -> None:
    async with echo() as running:
        for kind in ("flip", "replay", "drop"):
            bare = await Bare.connect(running.port)
            await bare.shake_hands()
            first = bare.send(lookup())
            await bare.next()
            before = len(running.received)
            second = bytearray(frame(encode(lookup()), bare.outgoing, 1 << 20))
            if kind == "flip":
                second[-20] ^= 1
            elif kind == "replay":
                second = bytearray(first)
            else:
                second = bytearray(frame(encode(lookup()), bare.outgoing, 1 << 20))
            bare.write(bytes(second))
            assert await failure_of(bare) == "tampered"
            assert len(running.received) == before
        await good_peer_is_well(running)


async def test_a_peer_that_breaks_the_protocol_gets_a_failure_and_is_closed() -> None:
    async with echo(Limits(frame=1 << 16)) as running:
        for body, code in (
            (msgpack.packb([77]), "protocol"),
            (msgpack.packb([6, b"123", b""]), "protocol"),
            (msgpack.packb([6, b""]), "protocol"),
            (encode(lookup())[:-1], "protocol"),
        ):
            bare = await Bare.connect(running.port)
            await bare.shake_hands()
            bare.write(frame(body, bare.outgoing, 1 << 20))
            assert await failure_of(bare) == code
        bare = await Bare.connect(running.port)
        await bare.shake_hands()
        bare.write(HEADER.pack((1 << 16) + 1))
        assert await failure_of(bare) == "frame_too_large"
        await good_peer_is_well(running)


async def test_a_frame_cut_short_by_the_connections_end_is_dropped() -> None:
    async with echo() as running:
        bare = await Bare.connect(running.port)
        await bare.shake_hands()
        bare.write(frame(encode(lookup()), bare.outgoing, 1 << 20)[:-1])
        await bare.close()
        assert await asyncio.wait_for(running.disconnected.get(), HANG_S) == "bare"
        assert running.received == []


async def test_a_peer_that_does_not_read_is_closed_and_others_are_not() -> None:
    async with echo(Limits(unsent=1 << 16)) as running:
        connection, inbox = await running.connect(name="good")
        deaf = await Bare.connect(running.port)
        await deaf.shake_hands()
        deaf.writer.transport.pause_reading()  # type: ignore[attr-defined]
        (peer,) = (peer for peer in running.server.peers if peer.name == "bare")
        while not peer.closing:
            peer.send(lookup(10_000))
        assert await asyncio.wait_for(running.disconnected.get(), HANG_S) == "bare"
        peer.send(lookup())  # to a closed peer: dropped
        connection.send(lookup())
        assert isinstance(await inbox.next(), Lookup)
        await connection.close()
        await deaf.close()


async def test_a_peer_that_reads_nothing_for_long_is_closed() -> None:
    async with echo(Limits(stall_s=0.05)) as running:
        deaf = await Bare.connect(running.port)
        await deaf.shake_hands()
        deaf.writer.transport.pause_reading()  # type: ignore[attr-defined]
        (peer,) = running.server.peers
        for _ in range(8):
            peer.send(lookup(1 << 20))
        assert await asyncio.wait_for(running.disconnected.get(), HANG_S) == "bare"
        await deaf.close()


@pytest.mark.parametrize(("error", "code"), [(ProtocolError("counts"), "protocol"), (KeyError("bug"), "internal")])
async def test_an_error_of_the_handler_closes_only_that_peer(error: Exception, code: str) -> None:
    def handle(peer: Peer, message: Message) -> None:
        if isinstance(message, Extend):
            raise error
        peer.send(message)

    server = Server(SECRET, WELCOME, handle, lambda peer: None)
    port = await server.start("127.0.0.1")
    good, bad = await Bare.connect(port), await Bare.connect(port)
    await good.shake_hands()
    await bad.shake_hands()
    bad.send(Extend())
    assert await failure_of(bad) == code
    good.send(lookup())
    assert isinstance(await good.next(), Lookup)
    await good.close()
    await server.close()


async def test_closing_the_server_closes_every_connection() -> None:
    async with echo(Limits(farewell_s=0.05)) as running:
        _, inbox = await running.connect()
        bare = await Bare.connect(running.port)
        await running.server.close()
        assert await inbox.end() is not None
        assert await bare.at_end()
        await bare.close()


def test_the_frame_limit_of_handshakes_has_room_for_long_names() -> None:
    """A Hello with long names fits the frame limit of unauthenticated peers."""
    assert len(encode(Hello(1, b"n" * 32, "i" * 255, "p" * 255))) < Limits().stranger_frame


def test_a_seal_adds_a_fixed_number_of_bytes() -> None:
    assert len(frame(b"x", Seal(b"k"), 99)) - len(frame(b"x", None, 99)) == 16
