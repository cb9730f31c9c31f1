from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from actors.engine.sizing import cache_bytes_per_token
from actors.engine.step_engine import StepEngine
from tests.support.tiny_models import ARCHITECTURES

QWEN2_32B = {"num_hidden_layers": 64, "num_attention_heads": 40, "num_key_value_heads": 8, "hidden_size": 5120}


def test_a_32b_target_costs_256_kib_a_token() -> None:
    assert cache_bytes_per_token({**QWEN2_32B, "torch_dtype": "bfloat16"}) == 256 * 1024
    assert cache_bytes_per_token(QWEN2_32B, "float32") == 512 * 1024
    assert cache_bytes_per_token({"text_config": QWEN2_32B, "dtype": "float16"}) == 256 * 1024


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cache_bytes_are_those_of_an_engines_pools(architecture: str) -> None:
    model = ARCHITECTURES[architecture]()
    engine = StepEngine(model, 64)
    taken = sum(pool.nbytes for pools in engine._pool.layers.values() for pool in pools)
    assert taken == 65 * cache_bytes_per_token(model.config.to_dict(), "float32")  # 64 rows and the trash row


def test_older_names_are_understood() -> None:
    assert cache_bytes_per_token({"n_layer": 12, "n_head": 12, "n_embd": 768}) == 12 * 2 * 768 * 4


def test_latent_attention_is_stored_expanded() -> None:
    config = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
    }
    assert cache_bytes_per_token(config, "bfloat16") == 2 * 4 * (16 + 8 + 12) * 2


@pytest.mark.parametrize(
    ("config", "dtype"), [({"num_hidden_layers": 2}, "auto"), ({}, "auto"), (QWEN2_32B, "int3"), (QWEN2_32B, "")]
)
def test_what_cannot_be_sized_is_an_error(config: dict[str, Any], dtype: str) -> None:
    with pytest.raises(ValueError, match=r"config\.json|unknown dtype"):
        cache_bytes_per_token(config, dtype)


def test_sizing_and_refusals_load_no_torch() -> None:
    code = (
        "import sys, actors.engine, actors.engine.sizing, actors.engine.compat, actors.engine.interface; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
