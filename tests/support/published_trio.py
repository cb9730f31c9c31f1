"""The published trio: what its config.json files say of its size, and what a service of it takes of a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from actors.api.generation import ROLES, Role
from actors.config import ModelConfig, ServiceConfig
from actors.engine.memory import GIB, USABLE
from actors.engine.sizing import context_length
from cluster.estimate import Estimate, estimate

H100, H200 = 79 * GIB, 140 * GIB  # what torch and nvidia-smi count of 80 and 141 GB
_SMALL = {"num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "hidden_size": 1_536}
_SMALL_TEXT = {"intermediate_size": 8_960, "vocab_size": 151_936, "torch_dtype": "bfloat16"}
CONFIGS: dict[Role, dict[str, Any]] = {
    "target": {
        **{"num_hidden_layers": 64, "num_attention_heads": 40, "num_key_value_heads": 8, "hidden_size": 5_120},
        **{"intermediate_size": 27_648, "vocab_size": 152_064, "torch_dtype": "bfloat16"},
        **{"tie_word_embeddings": False, "max_position_embeddings": 131_072},
    },
    "guider": _SMALL | _SMALL_TEXT | {"tie_word_embeddings": False, "max_position_embeddings": 131_072},
    "guider_base": _SMALL | _SMALL_TEXT | {"tie_word_embeddings": True, "max_position_embeddings": 4_096},
}


def published_estimates(service: ServiceConfig, folder: Path) -> dict[Role, Estimate]:
    """What `cluster.check` computes for a service of the published trio; its config.json files go into `folder`."""
    tokenizers: Any = {role: SimpleNamespace(max_position=context_length(CONFIGS[role])) for role in ROLES}
    models: dict[str, ModelConfig] = {}
    for role in ROLES:
        (folder / role).mkdir(parents=True)
        (folder / role / "config.json").write_text(json.dumps(CONFIGS[role]), encoding="utf-8")
        stored = {"path": str(folder / role), "load_format": "dummy"}
        models[role] = service.models.role(role).model_copy(update=stored)
    local = service.model_copy(update={"models": service.models.model_copy(update=models)})
    return {role: estimate(local, role, tokenizers)[0] for role in ROLES}


def memory_rows(estimates: dict[Role, Estimate], gpu: int) -> list[str]:
    """The lines of a table: by role its share, weights, each part of the reserve, and the cache that is left."""
    rows = []
    for role, costs in estimates.items():
        reserve, tokens = costs.reserve, costs.fitting_tokens(gpu)
        parts = (costs.weights_bytes, reserve.context, reserve.rows, reserve.top_k, reserve.graphs, reserve.step)
        share = costs.gpus * gpu * USABLE
        left = tokens * costs.cache_token_bytes
        cells = [f"{each / GIB:.2f}" for each in (share, *parts, left)]
        rows.append(f"| {role} | {costs.gpus:g} | {' | '.join(cells)} | {tokens:,} |")
    return rows
