from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from actors.engine.batch_invariant import BatchInvariantLinear
from actors.engine.native_runner import native_engine
from actors.engine.onednn_linear import OneDnnLinear, use_onednn_linears
from actors.engine.selfcheck import verify_engine
from tests.support.tiny_models import ARCHITECTURES, Driver, qwen2, tokens

pytestmark = pytest.mark.skipif(not torch._C._has_mkldnn, reason="torch without oneDNN")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 31, 200])
@torch.inference_mode()
def test_a_packed_layer_gives_the_product_of_the_plain_one(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(120, 77, bias=bias)
    hidden = torch.randn(1, rows, 120)
    torch.testing.assert_close(OneDnnLinear(plain)(hidden), plain(hidden), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_agree_with_those_of_plain_layers(architecture: str) -> None:
    rows = []
    for smallest in (1, 10**9):
        model = ARCHITECTURES[architecture]()
        assert (use_onednn_linears(model, smallest) > 0) == (smallest == 1)
        run = Driver(native_engine(model, 256))
        run.engine.extend([run.make(session, tokens(9, session)) for session in (1, 2)])
        run.engine.extend([run.make(1, [3]), run.make(2, tokens(5))])
        rows.append(torch.cat([run.logits(1), run.logits(2)]))
    difference = (rows[0] - rows[1]).norm(dim=-1) / rows[1].norm(dim=-1)
    assert float(difference.max()) < 1e-5


def test_a_packed_model_passes_the_check_at_start() -> None:
    model = qwen2()
    assert use_onednn_linears(model, 1) == 2 * 7 + 1
    verify_engine(native_engine(model, 128), "tiny")


def test_the_plain_weight_goes_unless_others_use_it() -> None:
    model = qwen2()  # its head is tied to the embeddings
    embeddings = model.get_input_embeddings().weight
    gone = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    use_onednn_linears(model, 1)
    assert gone() is None
    assert model.get_input_embeddings().weight is embeddings


def test_only_large_float32_layers_are_packed() -> None:
    assert use_onednn_linears(qwen2(), 509 * 48) == 1
    assert use_onednn_linears(qwen2().bfloat16(), 1) == 0


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_the_engine_packs_unless_bits_are_promised(batch_invariant: bool) -> None:
    model = qwen2()
    model.model.layers[0].mlp.up_proj = nn.Linear(48, 1 << 15, bias=False)
    model.model.layers[0].mlp.gate_proj = nn.Linear(48, 1 << 15, bias=False)
    model.model.layers[0].mlp.down_proj = nn.Linear(1 << 15, 48, bias=False)
    native_engine(model, 64, batch_invariant=batch_invariant)
    large, small = (BatchInvariantLinear, BatchInvariantLinear) if batch_invariant else (OneDnnLinear, nn.Linear)
    assert type(model.model.layers[0].mlp.up_proj) is large
    assert type(model.model.layers[1].mlp.up_proj) is small
