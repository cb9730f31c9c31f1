"""Computes a model's context length and the bytes of its KV cache and weights from its config.json: no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
# RoPE types that reach `factor` times the original context. The others state the scaled context themselves.
_SCALING_ROPES = frozenset({"linear", "yarn", "dynamic"})


def cache_bytes_per_token(config: Mapping[str, Any], dtype: str = "auto") -> int:
    """Bytes of the keys and values of one token in the cache of a model.

    config: a Hugging Face config.json; of a multimodal model the text part is used.
    dtype: "float32", "bfloat16", "float16", or "auto" for the one that the config names (float32 if none).
    Raises ValueError for a config without attention heads or an unknown dtype.
    """
    text = text_config(config)
    layers, heads = _first(text, "num_hidden_layers", "n_layer"), _first(text, "num_attention_heads", "n_head")
    if not layers or not heads:
        raise ValueError("config.json names no num_hidden_layers or num_attention_heads: not an attention model")
    per_layer = _latent_width(text) if text.get("kv_lora_rank") else _grouped_width(text)
    return layers * per_layer * _item_bytes(config, text, dtype)


def weight_bytes(config: Mapping[str, Any], dtype: str = "auto") -> int:
    """Bytes of the weights of a decoder with gated layers (Llama, Qwen), to about 1 %: without norms and biases.

    config, dtype: as in `cache_bytes_per_token`. Raises ValueError for a config of another kind of model.
    """
    text = text_config(config)
    hidden, layers = _first(text, "hidden_size", "n_embd"), _first(text, "num_hidden_layers", "n_layer")
    heads, vocabulary = _first(text, "num_attention_heads", "n_head"), _first(text, "vocab_size")
    if not (hidden and layers and heads and vocabulary):
        raise ValueError("config.json names no hidden_size, layers, heads or vocab_size: its weights cannot be counted")
    head_dim = _first(text, "head_dim") or hidden // heads
    attention = hidden * (2 * heads * head_dim + _grouped_width(text))
    experts = _first(text, "num_experts", "num_local_experts", "n_routed_experts") or 1
    inner = _first(text, *(("moe_intermediate_size",) if experts > 1 else ()), "intermediate_size", "n_inner")
    tables = 1 if text.get("tie_word_embeddings", config.get("tie_word_embeddings")) else 2
    count = vocabulary * hidden * tables + layers * (attention + 3 * hidden * (inner or 4 * hidden) * experts)
    return count * _item_bytes(config, text, dtype)


def hidden_widths(config: Mapping[str, Any]) -> tuple[int, int]:
    """Numbers of one token in a hidden state and within a layer's MLP; of a mixture, in the experts that it takes."""
    text = text_config(config)
    hidden, experts = _first(text, "hidden_size", "n_embd"), _first(text, "num_experts_per_tok")
    inner = _first(text, *(("moe_intermediate_size",) if experts else ()), "intermediate_size", "n_inner")
    return hidden, max(experts, 1) * (inner or 4 * hidden)


def row_width(config: Mapping[str, Any]) -> int:
    """Logits in a row."""
    return _first(text_config(config), "vocab_size")


def context_length(config: Mapping[str, Any]) -> int | None:
    """Tokens of context that a model is built for, as vLLM derives them; None if its config.json does not say.

    YaRN and linear scaling multiply `original_max_position_embeddings`, or `max_position_embeddings` without it, by
    their factor. llama3 and default RoPE, and the configs of Gemma 3, state the scaled context.
    """
    text = text_config(config)
    stated = _first(text, *_CONTEXT_KEYS) or _first(config, *_CONTEXT_KEYS)
    if "gemma3" in str(text.get("model_type") or config.get("model_type")):
        return stated or None
    return max((_scaled_context(rope, stated) for rope in rope_parameters(text)), default=stated) or None


def rope_parameters(text: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The RoPE settings of a text config: one set for all layers, or one for each type of layer.

    `rope_scaling` is the older key; where a config has both, transformers reads that one.
    """
    outer = text.get("rope_scaling") or text.get("rope_parameters")
    if isinstance(outer, Mapping):
        yield outer
        yield from (inner for inner in outer.values() if isinstance(inner, Mapping))


def rope_type(rope: Mapping[str, Any]) -> str:
    """The type in RoPE settings; `type` is the older key."""
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _scaled_context(rope: Mapping[str, Any], stated: int) -> int:
    if rope_type(rope) not in _SCALING_ROPES or not rope.get("factor"):
        return stated
    return int((rope.get("original_max_position_embeddings") or stated) * float(rope["factor"]))


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def _first(text: Mapping[str, Any], *names: str) -> int:
    """The value of the first of these keys (newer and older names of a quantity) that the config has, 0 if none."""
    return next((int(text[name]) for name in names if text.get(name)), 0)


def _grouped_width(text: Mapping[str, Any]) -> int:
    """Numbers per token and layer: keys and values of kv_heads heads with head_dim each."""
    heads = _first(text, "num_attention_heads", "n_head")
    head_dim = _first(text, "head_dim") or _first(text, "hidden_size", "n_embd") // heads
    return 2 * (_first(text, "num_key_value_heads") or heads) * head_dim


def _latent_width(text: Mapping[str, Any]) -> int:
    """Numbers per token and layer of multi-head latent attention: keys and values are stored expanded to all heads."""
    per_head = text["qk_nope_head_dim"] + text["qk_rope_head_dim"] + text["v_head_dim"]
    return int(text["num_attention_heads"]) * int(per_head)


def _item_bytes(config: Mapping[str, Any], text: Mapping[str, Any], dtype: str) -> int:
    if dtype == "auto":
        named = [part.get(key) for part in (text, config) for key in ("dtype", "torch_dtype")]
        dtype = next((str(name) for name in named if name), "float32")
    if dtype not in ITEM_BYTES:
        raise ValueError(f"unknown dtype {dtype!r}; known are auto, {', '.join(ITEM_BYTES)}")
    return ITEM_BYTES[dtype]
