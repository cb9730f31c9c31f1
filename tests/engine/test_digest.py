from __future__ import annotations

import torch

from actors.engine.digest import model_digest
from tests.support.tiny_models import llama, qwen2


def test_the_same_model_has_the_same_digest_after_a_restart() -> None:
    one, other = qwen2(), qwen2()
    other.config._name_or_path = "/elsewhere"
    other.set_attn_implementation("eager")
    assert model_digest(one) == model_digest(other)
    assert 0 <= model_digest(one) < 2**64


def test_other_weights_dtypes_and_architectures_differ() -> None:
    changed = qwen2()
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight += 1e-3
    digests = [model_digest(model) for model in (qwen2(), changed, qwen2().bfloat16(), llama())]
    assert len(set(digests)) == len(digests)
