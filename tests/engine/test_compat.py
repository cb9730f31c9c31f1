from __future__ import annotations

from typing import Any

import pytest
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, MambaConfig, Qwen2Config, Qwen3NextConfig

from actors.engine.compat import refuse_config
from actors.engine.errors import LoadError


@pytest.mark.parametrize("config", [Qwen2Config(), LlamaConfig(), Gemma3TextConfig(), GPT2Config()])
def test_full_and_sliding_attention_are_served(config: Any) -> None:
    refuse_config(config.to_dict(), "some/model")


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (Qwen3NextConfig().to_dict(), "linear_attention"),
        (MambaConfig().to_dict(), "no attention heads"),
        ({"num_attention_heads": 8, "layers_block_type": ["mamba", "attention"]}, "mamba"),
        ({"num_attention_heads": 8, "layer_types": ["chunked_attention"]}, "chunked_attention"),
        ({"text_config": {"num_attention_heads": 8, "layer_types": ["linear_attention"]}}, "linear_attention"),
    ],
)
def test_layers_with_state_outside_the_cache_are_refused(config: dict[str, Any], why: str) -> None:
    with pytest.raises(LoadError, match=why) as refusal:
        refuse_config(config, "some/model")
    assert refusal.value.what == "some/model"
    assert "another model" in refusal.value.out


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope_parameters": {"full_attention": {"rope_type": "longrope"}}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ],
)
def test_rope_that_depends_on_the_batch_is_refused(rope: dict[str, Any]) -> None:
    with pytest.raises(LoadError, match="longest sequence of the batch"):
        refuse_config({"num_attention_heads": 8, **rope}, "some/model")


def test_fixed_rope_scaling_is_served() -> None:
    refuse_config({"num_attention_heads": 8, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "some/model")
