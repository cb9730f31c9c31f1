from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from actors.engine.native_runner import native_engine
from actors.engine.sizing import cache_bytes_per_token, context_length
from tests.support.deadlines import HANG_S
from tests.support.tiny_models import ARCHITECTURES

QWEN2_32B = {"num_hidden_layers": 64, "num_attention_heads": 40, "num_key_value_heads": 8, "hidden_size": 5120}


def test_a_32b_target_costs_256_kib_a_token() -> None:
    assert cache_bytes_per_token({**QWEN2_32B, "torch_dtype": "bfloat16"}) == 256 * 1024
    assert cache_bytes_per_token(QWEN2_32B, "float32") == 512 * 1024
    assert cache_bytes_per_token({"text_config": QWEN2_32B, "dtype": "float16"}) == 256 * 1024


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cache_bytes_are_those_of_an_engines_pools(architecture: str) -> None:
    model = ARCHITECTURES[architecture]()
    engine = native_engine(model, 64)
    taken = sum(pool.nbytes for pools in engine.runner.cache.layers.values() for pool in pools)
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
        "import sys, actors.engine.memory, actors.engine.sizing, actors.engine.compat, actors.engine.interface; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=HANG_S).returncode == 0


def _rope(stated: int, **rope: Any) -> dict[str, Any]:
    return {"max_position_embeddings": stated, "rope_parameters": rope}


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024}, 1024),
        ({"max_position_embeddings": None}, None),
        ({}, None),
        # YaRN: the factor times the original context, whatever max_position_embeddings says.
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 16384),
        (_rope(32768, rope_type="yarn", factor=4.0, original_max_position_embeddings=32768), 131072),
        (_rope(163840, rope_type="yarn", factor=40, original_max_position_embeddings=4096), 163840),
        (_rope(131072, rope_type="yarn", factor=32.0, original_max_position_embeddings=4096), 131072),
        (_rope(131072, rope_type="yarn", factor=None, original_max_position_embeddings=4096), 131072),
        # Linear scaling: factor times max_position_embeddings.
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4}}, 16384),
        (_rope(2048, rope_type="linear", factor=2.5), 5120),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, None),
        # Types whose configs state the scaled context.
        (_rope(131072, rope_type="llama3", factor=8.0, original_max_position_embeddings=8192), 131072),
        (_rope(4096, rope_type="default", rope_theta=1e4), 4096),
        (_rope(4096, mrope_section=[1, 2, 3], type="mrope"), 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": None}, 4096),
        # One set for each type of layer, inside a multimodal config, and Gemma 3, which states the scaled context.
        (_rope(4096, full={"rope_type": "yarn", "factor": 2.0}, sliding={"rope_type": "default"}), 8192),
        ({"text_config": _rope(8192, rope_type="yarn", factor=2.0)}, 16384),
        ({"text_config": {"hidden_size": 8}, "max_position_embeddings": 512}, 512),
        (_rope(131072, full_attention={"rope_type": "linear", "factor": 8.0}) | {"model_type": "gemma3_text"}, 131072),
    ],
    ids=str,
)
def test_the_context_is_the_one_that_rope_scaling_reaches(config: dict[str, Any], context: int | None) -> None:
    assert context_length(config) == context
