"""Mutual authentication with the application's secret, and the keys derived from it.

    coordinator -> model   Hello      its nonce, the incarnation that it expects
    model -> coordinator   Challenge  the model's nonce, HMAC(secret, "model", both nonces, Hello)
    coordinator -> model   Proof      HMAC(secret, "coordinator", both nonces, Hello)
    model -> coordinator   Welcome    from here on frames are sealed

The HMACs cover the whole Hello, so it cannot be changed on the way, and the label of the sender, so a proof cannot be
reflected to its sender. The model authenticates first, so a coordinator never sends its proof to an impostor. This
module does no I/O.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from actors.wire.errors import HandshakeRefused
from actors.wire.framing import Seal
from actors.wire.messages import PROTOCOL, Challenge, Hello, Proof, encode

NONCE_BYTES = 32
SECRET_BYTES = 16  # the shortest secret accepted


def new_nonce() -> bytes:
    """A new random nonce."""
    return secrets.token_bytes(NONCE_BYTES)


def checked_secret(secret: bytes) -> bytes:
    """Returns `secret`. Raises ValueError if it is too short."""
    if len(secret) < SECRET_BYTES:
        raise ValueError(f"the wire's secret needs {SECRET_BYTES} bytes or more, this one has {len(secret)}")
    return secret


def derive(secret: bytes, label: bytes, hello: Hello, nonce: bytes) -> bytes:
    """HMAC-SHA256 of a label, the Hello and the model's nonce; 32 bytes."""
    transcript = hashlib.sha256(encode(hello)).digest() + hashlib.sha256(nonce).digest()
    return hmac.digest(secret, label + b"\0" + transcript, "sha256")


class CoordinatorHandshake:
    """The handshake at the connecting end."""

    def __init__(self, secret: bytes, incarnation: str, peer: str) -> None:
        self._secret = checked_secret(secret)
        self._nonce = b""
        self.hello = Hello(PROTOCOL, new_nonce(), incarnation, peer)

    def answer(self, challenge: Challenge) -> Proof:
        """The coordinator's proof. Raises HandshakeRefused if the model's proof is wrong."""
        self._nonce = challenge.nonce
        expected = derive(self._secret, b"model", self.hello, challenge.nonce)
        if len(challenge.nonce) != NONCE_BYTES or not hmac.compare_digest(expected, challenge.proof):
            raise HandshakeRefused("unauthenticated", "the model does not know this application's secret")
        return Proof(derive(self._secret, b"coordinator", self.hello, challenge.nonce))

    def seals(self) -> tuple[Seal, Seal]:
        """(outgoing, incoming)."""
        return seals(self._secret, self.hello, self._nonce)


class ModelHandshake:
    """The handshake at the listening end. Each connection has a new challenge, so a proof is valid once."""

    def __init__(self, secret: bytes, incarnation: str, hello: Hello) -> None:
        """Raises HandshakeRefused if the Hello is not acceptable."""
        if hello.protocol != PROTOCOL:
            raise HandshakeRefused("wrong_protocol", f"this model speaks protocol {PROTOCOL}, not {hello.protocol}")
        if len(hello.nonce) != NONCE_BYTES:
            raise HandshakeRefused("unauthenticated", f"a nonce has {NONCE_BYTES} bytes")
        self._secret = secret
        self._incarnation = incarnation
        self.hello = hello
        nonce = new_nonce()
        self.challenge = Challenge(nonce, derive(secret, b"model", hello, nonce))

    def verify(self, proof: Proof) -> None:
        """Raises HandshakeRefused if `proof` does not answer this connection's challenge."""
        expected = derive(self._secret, b"coordinator", self.hello, self.challenge.nonce)
        if not hmac.compare_digest(expected, proof.proof):
            raise HandshakeRefused("unauthenticated", "the proof does not fit the challenge")

    def check_incarnation(self) -> None:
        """Raises HandshakeRefused if the coordinator expects another process.

        Call it after `verify`, so that unauthenticated peers learn no incarnation.
        """
        if self.hello.incarnation not in ("", self._incarnation):
            raise HandshakeRefused(
                "wrong_incarnation", f"this is incarnation {self._incarnation}, not {self.hello.incarnation}"
            )

    def seals(self) -> tuple[Seal, Seal]:
        """(outgoing, incoming)."""
        incoming, outgoing = seals(self._secret, self.hello, self.challenge.nonce)
        return outgoing, incoming


def seals(secret: bytes, hello: Hello, nonce: bytes) -> tuple[Seal, Seal]:
    """The seals of (coordinator to model, model to coordinator)."""
    return (
        Seal(derive(secret, b"seal to model", hello, nonce)),
        Seal(derive(secret, b"seal to coordinator", hello, nonce)),
    )
