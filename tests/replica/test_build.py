"""From a role's configuration to the weights that are loaded."""

from __future__ import annotations

from typing import Any

import pytest

from actors.config import ModelConfig, load_config
from actors.engine.memory import AutoCache, held_rows
from actors.preflight import load_tokenizers, position_limit
from actors.replica.build import cache_of, load_role, serve_role, source_of
from tests.support.local_ray import trio_args


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


def auto_args() -> dict[str, Any]:
    args = trio_args()
    args["coordinator"] = {"max_sessions": 2}
    args["models"]["guider_base"] |= {"cache_tokens": "auto", "max_position": 100}
    return args


def test_a_stated_cache_is_passed_on_and_a_measured_one_as_what_is_known_of_it() -> None:
    config = load_config(auto_args())
    assert cache_of(config, "target") == config.models.target.cache_tokens
    assert cache_of(config, "guider_base") == AutoCache(1.0, 2, 100, 2_048)


def test_a_role_with_a_measured_cache_serves_sessions_as_long_as_it() -> None:
    """With `beyond_context: continue` a small model has no other limit."""
    config = load_config(auto_args() | {"beyond_context": "continue"})
    engine = load_role(config, "guider_base")
    tokenizers = load_tokenizers(config)
    longest = position_limit(config, "target", tokenizers["target"])
    assert engine.cache_stats().tokens_total == 2 * longest
    replica = serve_role(config, "guider_base", engine, tokenizers["guider_base"], incarnation="x", secret=bytes(32))
    assert replica._settings.max_position == 2 * longest


def test_rows_are_held_for_the_sessions_of_all_coordinators() -> None:
    config = load_config(auto_args() | {"coordinator": {"max_sessions": 10, "replicas": {"max": 2}}})
    assert load_role(config, "guider_base")._store.budget == held_rows(20) == 640
