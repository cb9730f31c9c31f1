"""Refuses models that the engine would compute wrongly, by their config.json alone: no torch, no weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from actors.engine.errors import LoadError
from actors.engine.sizing import text_config

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
    shifting = sorted(set(_rope_types(text)) & _SHIFTING_ROPES)
    if shifting:
        why = f"its RoPE type {', '.join(shifting)} depends on the longest sequence of the batch"
        raise LoadError(name, why, _way_out("a fixed RoPE: default, linear, llama3 or yarn"))


def _way_out(served: str) -> str:
    return f"Choose another model: the engine serves {served}."


def _rope_types(text: Mapping[str, Any]) -> Iterator[str]:
    """All RoPE types in a config, also those of layer types. `type` and `rope_scaling` are older keys."""
    for key in ("rope_parameters", "rope_scaling"):
        outer = text.get(key)
        if isinstance(outer, Mapping):
            for part in (outer, *(inner for inner in outer.values() if isinstance(inner, Mapping))):
                yield from (str(part[kind]) for kind in ("rope_type", "type") if part.get(kind))
