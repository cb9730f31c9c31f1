"""Ten thousand malicious frames, while an authenticated coordinator decodes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import logging
import os
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import msgpack
import pytest

from actors.wire.errors import HandshakeRefused
from actors.wire.framing import HEADER, Seal, frame
from actors.wire.handshake import CoordinatorHandshake, ModelHandshake
from actors.wire.link import Limits
from actors.wire.messages import (
    MESSAGES,
    PROTOCOL,
    Challenge,
    Extend,
    Failure,
    Hello,
    Message,
    Ping,
    Proof,
    Welcome,
    encode,
)
from actors.wire.server import Peer
from tests.support.coordinators import SECRET, Coordinator, Stage, rows_of, stage
from tests.support.deadlines import HANG_S
from tests.support.tiers import slow
from tests.support.wire_peers import WELCOME, Bare, echo

FRAMES = (1_000, slow(10_000))
AT_ONCE = 8  # attackers
LONGEST = 1 << 20  # most bytes of a frame in these tests
IN_TIME_S = 2.0  # longest wait of the good coordinator, on a machine that also runs the attackers


class Attacker:
    """One malicious connection. It ends when the replica has refused its data."""

    def __init__(self, bare: Bare, draw: random.Random, captured: list[bytes]) -> None:
        self.bare, self.draw, self.captured = bare, draw, captured

    def body(self, message: Message) -> bytes:
        """A message without a MAC, as during the handshake."""
        return frame(encode(message), None, LONGEST)

    def hello(self, **changed: object) -> Hello:
        fields = {"protocol": PROTOCOL, "nonce": self.draw.randbytes(32), "incarnation": "", "peer": "attacker"}
        return Hello(**(fields | changed))  # type: ignore[arg-type]

    async def challenged(self) -> tuple[CoordinatorHandshake, Challenge]:
        """Send Hello and receive the Challenge."""
        handshake = CoordinatorHandshake(SECRET, "", "attacker")
        self.bare.send(handshake.hello)
        challenge = await self.bare.next()
        assert isinstance(challenge, Challenge)
        return handshake, challenge

    async def required(self) -> Bare:
        """An authenticated connection. From here on the attacker is between its two ends."""
        assert isinstance(await self.bare.shake_hands(), Welcome)
        return self.bare

    # -- before the handshake

    async def noise(self) -> None:
        self.bare.write(self.draw.randbytes(self.draw.randrange(4, 200)))

    async def malformed(self) -> None:
        self.bare.write(frame(self.draw.randbytes(self.draw.randrange(0, 100)), None, LONGEST))

    async def unknown(self) -> None:
        parts = [self.draw.choice([0, 99, -1, "Hello", None, 1.5]), *(b"x" * self.draw.randrange(9) for _ in range(3))]
        self.bare.write(frame(msgpack.packb(parts), None, LONGEST))

    async def oversized(self) -> None:
        self.bare.write(HEADER.pack(self.draw.randrange(Limits().stranger_frame + 1, 1 << 32)))

    async def truncated(self) -> None:
        whole = self.body(self.hello())
        self.bare.write(whole[: self.draw.randrange(0, len(whole))])

    async def out_of_turn(self) -> None:
        wrong: list[Message] = [Proof(self.draw.randbytes(32)), Challenge(b"n" * 32, b"p" * 32), WELCOME, Extend()]
        self.bare.write(self.body(self.draw.choice(wrong)))

    async def old_protocol(self) -> None:
        self.bare.write(self.body(self.hello(protocol=PROTOCOL + self.draw.choice([-1, 1, 1 << 40]))))

    async def short_nonce(self) -> None:
        self.bare.write(self.body(self.hello(nonce=self.draw.randbytes(self.draw.choice([0, 16, 31, 33, 64])))))

    async def whole_conversation(self) -> None:
        self.bare.write(b"".join(self.captured))

    # -- during it

    async def forged_proof(self) -> None:
        await self.challenged()
        self.bare.write(self.body(Proof(self.draw.randbytes(self.draw.choice([0, 16, 32])))))

    async def reflected_proof(self) -> None:
        _, challenge = await self.challenged()
        self.bare.write(self.body(Proof(challenge.proof)))

    async def replayed_proof(self) -> None:
        await self.challenged()
        self.bare.write(self.captured[1])

    async def other_secret(self) -> None:
        handshake, challenge = await self.challenged()
        guess = CoordinatorHandshake(self.draw.randbytes(32), "", "attacker")
        guess.hello = handshake.hello
        with contextlib.suppress(HandshakeRefused):  # the model's own proof does not convince it either
            guess.answer(challenge)
        self.bare.write(self.body(Proof(guess._secret)))

    async def hello_again(self) -> None:
        await self.challenged()
        self.bare.write(self.body(self.hello()))

    async def failure(self) -> None:
        await self.challenged()
        self.bare.write(self.body(Failure(self.draw.randbytes(8).hex(), "a line\nof the log" * 99)))

    async def command_before_proof(self) -> None:
        await self.challenged()
        self.bare.write(self.captured[2])

    # -- after it: frames of other connections, and its own in the wrong place

    async def flipped(self) -> None:
        bare = await self.required()
        data = bytearray(frame(encode(Extend()), bare.outgoing, LONGEST))
        data[self.draw.randrange(HEADER.size, len(data))] ^= 1 << self.draw.randrange(8)
        bare.write(bytes(data))

    async def foreign(self) -> None:
        (await self.required()).write(self.draw.choice(self.captured[2:]))

    async def replayed(self) -> None:
        bare = await self.required()
        data = frame(encode(Extend()), bare.outgoing, LONGEST)
        bare.write(data + data)

    async def reordered(self) -> None:
        bare = await self.required()
        first, second = (frame(encode(Extend()), bare.outgoing, LONGEST) for _ in range(2))
        bare.write(second + first)

    async def unsealed(self) -> None:
        (await self.required()).write(self.body(Extend()))

    async def oversized_later(self) -> None:
        (await self.required()).write(HEADER.pack(self.draw.randrange(Limits().frame + 1, 1 << 32)))

    async def sealed_nonsense(self) -> None:
        bare = await self.required()
        tags = [tag for tag in MESSAGES if tag != Ping.tag]  # a Ping has no fields, so it is valid
        parts: list[object] = [self.draw.choice(tags), *[b"odd" for _ in range(self.draw.randrange(7))]]
        bare.write(frame(msgpack.packb(parts), bare.outgoing, LONGEST))

    async def models_words(self) -> None:
        words: list[Message] = [WELCOME, Challenge(b"n" * 32, b"p" * 32), Proof(b"p")]
        (await self.required()).send(self.draw.choice(words))


Attack = Callable[[Attacker], Awaitable[None]]
STRANGERS: dict[Attack, set[str]] = {
    Attacker.noise: {"protocol", "frame_too_large", "lost"},
    Attacker.malformed: {"protocol"},
    Attacker.unknown: {"protocol"},
    Attacker.oversized: {"frame_too_large"},
    Attacker.truncated: {"lost"},
    Attacker.out_of_turn: {"protocol"},
    Attacker.old_protocol: {"wrong_protocol"},
    Attacker.short_nonce: {"unauthenticated"},
    Attacker.whole_conversation: {"unauthenticated"},
    Attacker.forged_proof: {"unauthenticated"},
    Attacker.reflected_proof: {"unauthenticated"},
    Attacker.replayed_proof: {"unauthenticated"},
    Attacker.other_secret: {"unauthenticated"},
    Attacker.hello_again: {"protocol"},
    Attacker.failure: {"remote"},
    Attacker.command_before_proof: {"protocol"},
}
BETWEEN: dict[Attack, set[str]] = {
    Attacker.flipped: {"tampered"},
    Attacker.foreign: {"tampered"},
    Attacker.replayed: {"tampered"},
    Attacker.reordered: {"tampered"},
    Attacker.unsealed: {"tampered"},
    Attacker.oversized_later: {"frame_too_large"},
    Attacker.sealed_nonsense: {"protocol", "remote"},
    Attacker.models_words: {"protocol"},
}
ATTACKS = STRANGERS | BETWEEN


async def captured_from(port: int) -> list[bytes]:
    """Hello, Proof and two sealed frames of a valid connection."""
    bare = await Bare.connect(port)
    handshake = CoordinatorHandshake(SECRET, "", "good")
    said = [bare.send(handshake.hello)]
    challenge = await bare.next()
    assert isinstance(challenge, Challenge)
    said.append(bare.send(handshake.answer(challenge)))
    bare.outgoing, bare.incoming = handshake.seals()
    assert isinstance(await bare.next(), Welcome)
    said += [bare.send(Extend()), bare.send(Extend())]
    await bare.close()
    return said


async def attack(port: int, kind: Attack, draw: random.Random, captured: list[bytes]) -> None:
    """Attack once, then wait until the replica has closed the connection."""
    bare = await Bare.connect(port)
    # Closing with a reset leaves no socket in TIME_WAIT.
    bare.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with contextlib.suppress(ConnectionError):
        await kind(Attacker(bare, draw, captured))
        if kind in (Attacker.noise, Attacker.truncated):
            bare.writer.write_eof()
        await asyncio.wait_for(bare.reader.read(), HANG_S)
    bare.writer.transport.abort()


async def decode(
    good: Coordinator, session: int, over: Callable[[int], bool]
) -> tuple[list[tuple[list[int], float]], float]:
    """Decode one token after another until there are enough; the rows' (ids, logsumexp), the longest wait for one."""
    tokens: list[int] = []
    seen: list[tuple[list[int], float]] = []
    longest = 0.0
    while not over(len(seen)):
        began = time.monotonic()
        before = tokens if len(tokens) < 400 else []
        tokens = [*before, len(tokens) % 60]
        row = await rows_of(good.ask(session, tokens[-1:], before=before))
        longest = max(longest, time.monotonic() - began)
        seen.append((row.ids[0].tolist(), row.logsumexp[0]))
        await asyncio.sleep(0)
    return seen, longest


async def assault(on: Stage, kinds: list[Attack], frames: int, seed: int) -> Counter[str]:
    """Run so many attacks, several at a time. Returns their number by kind."""
    draw = random.Random(seed)
    captured = await captured_from(on.port)
    chosen = [kinds[number % len(kinds)] for number in range(frames)]
    draw.shuffle(chosen)
    waiting = iter(chosen)

    async def keep_on(own: random.Random) -> None:
        for kind in waiting:
            await attack(on.port, kind, own, captured)

    await asyncio.gather(*(keep_on(random.Random(draw.random())) for _ in range(AT_ONCE)))
    async with asyncio.timeout(HANG_S):
        # there is no event for the last one
        while on.replica._server.strangers or sum(on.replica.stats().refused_connections.values()) < frames:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    return Counter(kind.__name__ for kind in chosen)


@pytest.mark.parametrize("frames", FRAMES)
async def test_bad_frames_are_refused_counted_and_harmless(frames: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with stage() as on:
        good = await on.coordinator("good")
        attacked = asyncio.Event()
        decoding = asyncio.create_task(decode(good, 1, lambda count: attacked.is_set()))
        done = await assault(on, list(ATTACKS), frames, seed=5)
        attacked.set()
        seen, longest = await decoding
        refused = on.replica.stats().refused_connections
        assert sum(refused.values()) == done.total() == frames
        assert {link.name for link in on.replica._server.links} == {"good"}
        assert longest < IN_TIME_S
        quiet = await on.coordinator("quiet")
        alone, _ = await decode(quiet, 2, lambda count: count == len(seen))
        assert seen == alone
        gc.collect()
        assert (
            sum(type(thing) is Peer for thing in gc.get_objects()) == 2
        )  # good and quiet: no unauthenticated peer is kept
    assert len(caplog.records) < 100
    assert "a line" not in caplog.text


@pytest.mark.parametrize("kind", ATTACKS, ids=lambda kind: kind.__name__)
async def test_every_kind_is_refused_with_its_code(kind: Attack) -> None:
    async with stage() as on:
        await assault(on, [kind], 20, seed=1)
        refused = on.replica.stats().refused_connections
        assert set(refused) <= ATTACKS[kind]
        assert sum(refused.values()) == 20


async def test_excess_unauthenticated_connections_are_closed_at_once() -> None:
    async with stage(limits=Limits(strangers=5, farewell_s=0.2)) as on:
        good = [await on.coordinator(f"good-{number}") for number in range(6)]
        idle = [await Bare.connect(on.port) for _ in range(5)]
        for waiting in idle:
            waiting.send(Hello(PROTOCOL, os.urandom(32), "", "idle"))
            assert isinstance(await waiting.next(), Challenge)
        late = await Bare.connect(on.port)
        with contextlib.suppress(ConnectionResetError):
            assert await late.at_end()
        assert on.replica.stats().refused_connections == {"strangers": 1}
        await rows_of(good[0].ask(1, [1]))
        await idle.pop().close()
        while on.replica._server.strangers == 5:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.001)
        await rows_of((await on.coordinator("later")).ask(2, [1]))
        for each in (*idle, late):
            await each.close()


async def test_secrets_are_in_no_log_and_in_no_repr(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    coordinator = CoordinatorHandshake(SECRET, "", "good")
    model = ModelHandshake(SECRET, "g-1", coordinator.hello)
    proof = coordinator.answer(model.challenge)
    secret = [SECRET, coordinator.hello.nonce, model.challenge.nonce, model.challenge.proof, proof.proof]
    things = [coordinator, model, coordinator.hello, model.challenge, proof, Seal(SECRET), *coordinator.seals()]
    async with stage() as on:
        good = await on.coordinator("good")
        for kind in STRANGERS:
            on.replica._server._report_at = 0.0  # log each
            captured = await captured_from(on.port)
            secret += captured[:2]
            await attack(on.port, kind, random.Random(1), captured)
        things += [good.connection, on.replica, on.replica._server, *on.replica._server.links, on.replica.stats()]
    async with echo() as running:
        with pytest.raises(HandshakeRefused) as refused:
            await running.connect(secret=bytes(range(32)))
        secret.append(bytes(range(32)))
        things.append(refused.value)
    shown = caplog.text + "".join(f"{thing!r}{thing}" for thing in things)
    assert "refused" in caplog.text
    for value in secret:
        for written in (value.hex(), base64.b64encode(value).decode(), repr(value)[2:-1]):
            assert written not in shown
