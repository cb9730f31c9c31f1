"""Messages between processes of two versions of this code."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from actors.api import generation, guidance, sampling_params
from actors.api.generation import Delta, Finished, Generate, Resume, Usage
from actors.api.guidance import Guidance
from actors.api.message import Message, UnknownField, restore
from actors.api.sampling_params import Sampling, Thinking

REQUEST = Generate(
    "a", "target", {"target": [1]}, Sampling(), Guidance(), Thinking(), 7, grammar="start: A", client="b"
)


def fields_of(message: Message) -> dict[str, Any]:
    kind, given = message.__reduce__()[1]
    assert kind is type(message)
    return dict(given)


@pytest.mark.parametrize(
    "message", [REQUEST, Resume([3, 4]), Delta("a", tokens=[1]), Finished("stop", Usage(1, 2, 0, 0, 0, 0, 0.0))]
)
def test_a_message_arrives_as_it_was_sent(message: Message) -> None:
    assert pickle.loads(pickle.dumps(message)) == message  # noqa: S301  # its own bytes


def test_fields_that_an_older_version_does_not_send_have_their_defaults() -> None:
    given = fields_of(REQUEST)
    del given["grammar"], given["drafts"]
    assert restore(Generate, given).grammar == ""
    assert restore(Generate, given).client == "b"


@pytest.mark.parametrize("empty", ["", 0, None, (), False])
def test_an_empty_field_of_a_newer_version_is_dropped(empty: Any) -> None:
    assert restore(Generate, fields_of(REQUEST) | {"novelty": empty}) == REQUEST


def test_a_field_that_a_newer_version_needs_is_not_ignored() -> None:
    with pytest.raises(UnknownField, match="novelty"):
        restore(Generate, fields_of(REQUEST) | {"novelty": "x"})


def test_everything_between_router_and_coordinator_is_a_message() -> None:
    modules = generation, guidance, sampling_params
    kinds = {each for module in modules for each in vars(module).values() if hasattr(each, "__dataclass_fields__")}
    assert len(kinds) > 10
    assert all(issubclass(kind, Message) for kind in kinds)
