"""Refuses models and adapters that the engine would compute wrongly, by their config files alone: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actors.engine.errors import LoadError
from actors.engine.sizing import rope_parameters, rope_type, text_config

# "attention" is an older name of full attention.
SERVED_LAYERS = frozenset({"full_attention", "sliding_attention", "attention"})
_LAYER_KEYS = ("layer_types", "layers_block_type", "block_types")
# Their frequencies depend on the longest sequence of the batch, so other sessions would change a token's logits.
_SHIFTING_ROPES = frozenset({"dynamic", "longrope", "su"})


def refuse_config(config: Mapping[str, Any], name: str) -> None:
    """Raise LoadError if the engine cannot serve the model `name` with this config.

    Linear attention and state-space layers keep state, which a packed ragged forward would mix between sessions. RoPE
    that depends on the batch's longest sequence is not repeatable.
    """
    text = text_config(config)
    if not (text.get("num_attention_heads") or text.get("n_head")):
        raise LoadError(name, "its config names no attention heads", _way_out("causal language models with attention"))
    unserved = sorted({str(kind) for key in _LAYER_KEYS for kind in text.get(key) or ()} - SERVED_LAYERS)
    if unserved:
        why = f"its layers of type {', '.join(unserved)} keep state outside of the attention cache"
        raise LoadError(name, why, _way_out("models of full and sliding attention only"))
    shifting = sorted({rope_type(rope) for rope in rope_parameters(text)} & _SHIFTING_ROPES)
    if shifting:
        why = f"its RoPE type {', '.join(shifting)} depends on the longest sequence of the batch"
        raise LoadError(name, why, _way_out("a fixed RoPE: default, linear, llama3 or yarn"))


def refuse_adapter(settings: Mapping[str, Any], name: str) -> None:
    """Raise LoadError if the adapter `name` with this adapter_config.json cannot be merged: only LoRA is served."""
    served = (
        "Served are LoRA adapters (peft_type LORA, DoRA included): train one, or merge this adapter into its model."
    )
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise LoadError(name, f"its peft_type is {kind or 'missing'}", served)
    if settings.get("alora_invocation_tokens"):
        raise LoadError(
            name, "it is an activated LoRA, which changes only the text after its invocation tokens", served
        )
    if settings.get("layer_replication"):
        raise LoadError(name, "its layer_replication adds layers to the model", served)


def _way_out(served: str) -> str:
    return f"Choose another model: the engine serves {served}."
