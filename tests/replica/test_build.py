"""From a role's configuration to the weights that are loaded."""

from __future__ import annotations

from typing import Any

import pytest

from actors.config import ModelConfig
from actors.replica.build import source_of


@pytest.mark.parametrize(
    ("keys", "device"),
    [
        ({}, "cpu"),
        ({"num_gpus": 0.3}, "cuda"),
        ({"num_gpus": 1, "device": "cpu"}, "cpu"),
        ({"device": "cuda"}, "cuda"),
    ],
    ids=["nothing reserved", "a reserved GPU", "the CPU by name", "a GPU by name"],
)
def test_a_role_computes_on_what_is_reserved_for_it_unless_its_device_is_named(
    keys: dict[str, Any], device: str
) -> None:
    assert source_of(ModelConfig(path="some/model", **keys)).device == device
