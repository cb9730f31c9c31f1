"""Tiny models with random weights of architectures that vLLM serves, and one that it serves otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    DeepseekV2Config,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

_SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1_024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def qwen3() -> Any:
    return Qwen3Config(**_SHAPE, num_hidden_layers=3)


def gemma3() -> Any:
    """Five sliding layers for each full one, so that the cache has groups."""
    return Gemma3TextConfig(**_SHAPE, num_hidden_layers=6, sliding_window=32, query_pre_attn_scalar=32)


def qwen3_moe() -> Any:
    return Qwen3MoeConfig(**_SHAPE, **_EXPERTS, num_hidden_layers=2)


def gpt_oss() -> Any:
    """Attention sinks and alternating sliding layers."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return GptOssConfig(**_SHAPE, **experts, num_hidden_layers=2, sliding_window=32, rope_scaling=None)


def narrow_heads() -> Any:
    """Heads of a width that vLLM's kernels for CPUs do not have."""
    return LlamaConfig(**_SHAPE | {"hidden_size": 48, "head_dim": 12}, num_hidden_layers=2)


def latent_attention() -> Any:
    shape = {key: value for key, value in _SHAPE.items() if key != "head_dim"}
    latent = {"kv_lora_rank": 32, "q_lora_rank": None, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32}
    dense = {"num_key_value_heads": 4, "num_hidden_layers": 2, "first_k_dense_replace": 2}
    return DeepseekV2Config(**shape | dense, **latent)


SERVED = {"qwen3": qwen3, "gemma3": gemma3, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss}
REFUSED = {"narrow_heads": narrow_heads, "latent_attention": latent_attention}


def saved(config: Any, folder: Path) -> Path:
    """The folder, with a model of this config."""
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config) if isinstance(config, Gemma3TextConfig) else Auto.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.float().save_pretrained(folder)
    return folder
