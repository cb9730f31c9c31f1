"""Sizes of published models, as fields of a Qwen2Config. It imports nothing."""

from __future__ import annotations


def sizes(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
    }


QWEN_32B = sizes(64, 5_120, 27_648, 40, 8, 152_064)  # Qwen2.5-32B
QWEN_1_5B = sizes(28, 1_536, 8_960, 12, 2, 151_936)  # Qwen2.5-1.5B
