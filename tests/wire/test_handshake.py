"""Mutual authentication, without sockets."""

import dataclasses

import pytest

from actors.wire.errors import HandshakeRefused
from actors.wire.handshake import CoordinatorHandshake, ModelHandshake
from actors.wire.messages import Challenge, Proof

SECRET = b"a secret of the whole application"


def shake(secret: bytes = SECRET, incarnation: str = "") -> tuple[CoordinatorHandshake, ModelHandshake, Proof]:
    coordinator = CoordinatorHandshake(secret, incarnation, "c")
    model = ModelHandshake(SECRET, "g-1", coordinator.hello)
    return coordinator, model, coordinator.answer(model.challenge)


def test_both_ends_derive_the_same_seals_one_for_each_direction() -> None:
    coordinator, model, proof = shake(incarnation="g-1")
    model.verify(proof)
    model.check_incarnation()
    (up, down), (model_down, model_up) = coordinator.seals(), model.seals()
    macs = [seal.seal(b"x") for seal in (up, down, model_up, model_down)]
    assert macs[:2] == macs[2:]
    assert macs[0] != macs[1]


def test_a_coordinator_refuses_a_model_that_does_not_know_the_secret() -> None:
    with pytest.raises(HandshakeRefused) as refused:
        shake(secret=b"another secret altogether")
    assert refused.value.code == "unauthenticated"


def test_a_replayed_proof_opens_no_second_connection() -> None:
    coordinator, _, proof = shake()
    again = ModelHandshake(SECRET, "g-1", coordinator.hello)
    with pytest.raises(HandshakeRefused):
        again.verify(proof)


def test_a_models_proof_reflected_to_it_is_refused() -> None:
    _, model, _ = shake()
    with pytest.raises(HandshakeRefused):
        model.verify(Proof(model.challenge.proof))


def test_the_coordinator_detects_a_hello_changed_on_the_way() -> None:
    coordinator = CoordinatorHandshake(SECRET, "g-1", "c")
    hello = coordinator.hello
    for changed in (dataclasses.replace(hello, incarnation=""), dataclasses.replace(hello, peer="other")):
        model = ModelHandshake(SECRET, "g-1", changed)
        with pytest.raises(HandshakeRefused):
            coordinator.answer(model.challenge)


def test_another_incarnation_is_refused() -> None:
    _, model, proof = shake(incarnation="g-0")
    model.verify(proof)
    with pytest.raises(HandshakeRefused, match="g-1, not g-0") as refused:
        model.check_incarnation()
    assert refused.value.code == "wrong_incarnation"


def test_another_protocol_and_a_short_nonce_are_refused_at_once() -> None:
    hello = CoordinatorHandshake(SECRET, "", "c").hello
    other_version, short = dataclasses.replace(hello, protocol=99), dataclasses.replace(hello, nonce=b"short")
    for broken, code in ((other_version, "wrong_protocol"), (short, "unauthenticated")):
        with pytest.raises(HandshakeRefused) as refused:
            ModelHandshake(SECRET, "g-1", broken)
        assert refused.value.code == code
    with pytest.raises(HandshakeRefused):
        CoordinatorHandshake(SECRET, "", "c").answer(Challenge(b"", b""))


def test_a_secret_that_is_too_short_is_an_error() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        CoordinatorHandshake(b"short", "", "c")
