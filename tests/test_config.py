"""The configuration: each error names its key."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from pydantic import ValidationError

from actors.api.sampling_params import Sampling
from actors.config import ConfigError, ServiceConfig, as_this_release_reads, load_config

MODELS = {role: {"path": f"models/{role}"} for role in ("target", "guider", "guider_base")}
MINIMAL: dict[str, Any] = {"version": 1, "models": MODELS}


def with_value(place: str, value: Any) -> dict[str, Any]:
    """The smallest configuration, with one more value at a dotted place."""
    args = copy.deepcopy(MINIMAL)
    inner = args
    *path, last = place.split(".")
    for part in path:
        inner = inner.setdefault(part, {})
    inner[last] = value
    return args


def refusal(args: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as raised:
        load_config(args)
    return str(raised.value)


def test_three_models_and_a_version_are_enough() -> None:
    config = load_config(MINIMAL)
    assert config.models.role("guider").path == "models/guider"
    assert config.exchange.mode == "topk"
    assert config.guidance.alpha == 1.0


@pytest.mark.parametrize(
    "place",
    [
        "modles",
        "models.draft",
        "models.target.num_gpu",
        "models.guider_base.replicas.minimum",
        "guidance.apha",
        "thinking.budget",
        "sampling.topp",
        "exchange.width",
        "coordinator.max_session",
        "coordinator.replicas.mx",
        "router.port",
        "router.replicas.count",
        "router.keys.path",
        "router.limits.per_minute",
        "deadlines.step",
    ],
)
def test_an_unknown_key_is_named_at_every_level(place: str) -> None:
    assert refusal(with_value(place, 1)).startswith(f"{place}: unknown key")


def test_every_wrong_key_is_named_at_once() -> None:
    args = with_value("exchange.width", 1) | {"exat": True}
    sentences = refusal(args).splitlines()
    assert sorted(sentence.split(":")[0] for sentence in sentences) == ["exat", "exchange.width"]


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("version", 2, "1"),
        ("name", "../up", "pattern"),
        ("models.target.path", "", "at least 1"),
        ("models.target.dtype", "int8", "float32"),
        ("models.target.cache_tokens", 0, "auto, or a whole number of at least 64"),
        ("models.target.cache_tokens", "all", "auto, or a whole number of at least 64"),
        ("models.target", {"path": "m", "cache_tokens": "auto", "device_map": "auto"}, "set a number"),
        ("models.target.replicas", {"min": 3, "max": 2}, "replicas.max (2) is below replicas.min (3)"),
        ("models.target.replicas", {"min": 0}, "1"),
        ("models.target.replicas.target_cache", 1.5, "1"),
        ("models.target.replicas.target_ongoing", 5, "unknown key"),
        ("coordinator.replicas", {"max": 2, "target_ongoing": 320}, "replicas.target_ongoing (320) is never passed"),
        ("models.target.num_gpus", -1, "0"),
        ("exchange.mode", "rows", "topk"),
        ("exchange.k", 0, "1"),
        ("exchange.max_unseen_mass", 1.5, "1"),
        ("exchange.widen_factor", 1, "2"),
        ("coordinator.max_sessions", 0, "1"),
        ("deadlines.step_s", 0, "0"),
        ("router.limits.open_requests", 0, "1"),
        ("router.limits", {"open_requests": 1}, "limits are counted for each key"),
        ("router.keys.env", "MY KEYS", "pattern"),
        ("router.keys.open_paths", ["health"], "pattern"),
        ("router.cors_origins", ["https://a.example/"], "pattern"),
        ("router.max_request_tokens", 0, "1"),
        ("beyond_context", "truncate", "stop_guidance"),
        ("guidance.alpha", float("nan"), "alpha must be a finite number"),
        ("guidance.schedule", [[5, 1.0], [2, 0.5]], "rise"),
        ("sampling.temperature", -1, "temperature must be at least 0"),
        ("sampling.top_p", 0, "top_p must be above 0"),
        ("thinking.max_tokens", 0, "thinking.max_tokens"),
        ("thinking.closing", "so</think>", "must not hold thinking.end"),
        ("reasoning_effort", {"none": {}}, "none is always alpha 0"),
        ("reasoning_effort.low.alpha", 5_000, "1000"),
        ("reasoning_effort.low.budget", 5, "unknown key"),
        ("batch_invariant", "perhaps", "bool"),
    ],
)
def test_an_invalid_value_is_named_with_what_it_should_be(place: str, value: Any, said: str) -> None:
    sentence = refusal(with_value(place, value))
    assert sentence.startswith(place.split(".")[0])
    assert place.split(".")[-1] in sentence
    assert said in sentence
    assert "Value error" not in sentence


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        ("exact", "batch_invariant", True),
        ("exchange.widen_above", "exchange.max_unseen_mass", 0.25),
        ("deadlines.missing_s", "deadlines.reconnect_timeout_s", 7.0),
        ("deadlines.silent_s", "deadlines.peer_timeout_s", 7.0),
    ],
)
def test_an_old_key_is_read_with_a_warning(old: str, new: str, value: Any) -> None:
    with pytest.warns(FutureWarning, match=f"{old.split('.')[-1]} is called {new.split('.')[-1]} now"):
        config = load_config(with_value(old, value))
    assert config == load_config(with_value(new, value))
    both = with_value(old, value)
    *path, last = new.split(".")
    (both[path[0]] if path else both)[last] = value
    assert "both are given" in refusal(both)


def test_coordinators_are_added_before_requests_wait() -> None:
    config = load_config(with_value("coordinator.max_sessions", 40)).coordinator
    assert config.target_ongoing == 30
    args = with_value("coordinator.replicas", {"max": 2, "target_ongoing": 5})
    assert load_config(args).coordinator.target_ongoing == 5


def test_a_missing_model_or_version_is_named() -> None:
    args = copy.deepcopy(MINIMAL)
    del args["models"]["guider"]
    assert refusal(args).startswith("models.guider: ")
    assert refusal({"models": MODELS}).startswith("version: ")
    assert refusal({}).count("\n") == 1


def test_code_from_a_model_repository_needs_a_pinned_revision() -> None:
    sentence = refusal(with_value("models.target.trust_remote_code", True))
    assert sentence.startswith("models.target: ")
    assert "pin a revision" in sentence
    args = with_value("models.target.trust_remote_code", True)
    args["models"]["target"]["revision"] = "0123abc"
    assert load_config(args).models.target.trust_remote_code


def test_each_role_is_served_alone_beside_the_guided_model() -> None:
    assert load_config({**MINIMAL, "name": "demo"}).served_names == {
        "demo": "guided",
        "demo/target": "target",
        "demo/guider": "guider",
        "demo/guider-base": "guider_base",
    }


def test_a_configuration_cannot_be_changed() -> None:
    config = load_config(MINIMAL)
    with pytest.raises(ValidationError, match="frozen"):
        config.batch_invariant = True  # type: ignore[misc]


def test_an_effort_is_a_limit_of_the_thinking_and_an_alpha() -> None:
    config = load_config(MINIMAL | {"reasoning_effort": {"brief": {"thinking_tokens": 50, "alpha": 0.5}}})
    assert [*config.efforts] == ["none", "brief"]
    assert (config.efforts["brief"].thinking_tokens, config.efforts["brief"].alpha) == (50, 0.5)
    assert (config.efforts["none"].thinking_tokens, config.efforts["none"].alpha) == (0, 0.0)


def test_the_default_efforts_allow_more_thinking_one_after_the_other() -> None:
    efforts = load_config(MINIMAL).efforts
    assert [*efforts] == ["none", "minimal", "low", "medium", "high", "xhigh", "max"]
    limits = [math.inf if each.thinking_tokens is None else each.thinking_tokens for each in efforts.values()]
    assert limits == sorted(limits)


def test_decoding_defaults_are_taken_from_the_file() -> None:
    args = {
        **MINIMAL,
        "guidance": {"alpha": 0.5, "warmup_tokens": 100, "schedule": [[200, 0.25]]},
        "sampling": {"temperature": 0.6, "top_p": 0.95, "stop": ["END"]},
        "thinking": {"start": "<think>", "max_tokens": 512},
    }
    config = load_config(args)
    assert config.guidance.alpha_at(200) == 0.25
    assert config.default_sampling.stop == ("END",)
    assert config.thinking.end == "</think>"
    assert ServiceConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine": "native"}, "set engine to auto or vllm"),
        ({"device_map": "auto"}, "cannot be combined with device_map"),
        ({"quantization": {"quant_method": "bitsandbytes"}}, "cannot be combined with quantization"),
        ({"adapter": "some/adapter"}, "cannot be combined with adapter"),
        ({"num_gpus": 2}, "per rank"),
        ({"num_gpus": 0.5}, "no two ranks share a GPU"),
        ({"num_cpus": 0}, "num_cpus or num_gpus above 0"),
    ],
)
def test_settings_that_tensor_parallel_does_not_support_are_refused(settings: dict[str, Any], said: str) -> None:
    args = with_value("models.target.tensor_parallel", 2)
    args["models"]["target"].update(settings)
    assert said in refusal(args)
    args["models"]["target"]["tensor_parallel"] = 1
    load_config(args)


def test_the_checkpoints_sampling_can_be_configured() -> None:
    config = load_config(with_value("sampling", "checkpoint"))
    recommended = {"temperature": 0.6, "top_p": 0.95, "top_k": -1}
    assert config.with_recommended_sampling(recommended).default_sampling == Sampling(temperature=0.6, top_p=0.95)
    assert config.with_recommended_sampling({}).default_sampling == Sampling()
    fixed = load_config(with_value("sampling.temperature", 0.3))
    assert fixed.with_recommended_sampling(recommended).default_sampling.temperature == 0.3


@pytest.mark.parametrize("recommended", [{"top_p": 2}, {"temperature": "warm"}, {"top_k": "many"}])
def test_a_wrong_sampling_of_the_checkpoint_is_an_error_with_a_remedy(recommended: dict[str, Any]) -> None:
    config = load_config(with_value("sampling", "checkpoint"))
    with pytest.raises(ConfigError, match=r"generation_config\.json.*write the values"):
        config.with_recommended_sampling(recommended)


def test_another_word_for_the_sampling_is_refused_by_name() -> None:
    assert refusal(with_value("sampling", "model")).startswith("sampling: ")


def test_a_stored_configuration_gets_the_defaults_of_newer_keys() -> None:
    stored = load_config(MINIMAL | {"name": "duo", "batch_invariant": True}).model_dump(mode="json")
    older = {key: value for key, value in stored.items() if key not in ("reasoning_effort", "batch_invariant")}
    older |= {"exact": True, "thinking": {key: value for key, value in stored["thinking"].items() if key != "closing"}}
    assert as_this_release_reads(older) == stored
