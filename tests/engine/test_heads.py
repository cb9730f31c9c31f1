from __future__ import annotations

import torch

from actors.engine.heads import Float32Head, widen_head
from actors.engine.native_runner import native_engine
from tests.support.tiny_models import VOCABULARY, Driver, qwen2, tokens


def test_a_16_bit_models_rows_are_not_rounded_to_16_bits() -> None:
    engine = native_engine(qwen2().bfloat16(), 64)
    run = Driver(engine)
    run.extend(1, tokens(6))
    rows = run.logits(1)
    assert rows.dtype == torch.float32
    assert not torch.equal(rows, rows.bfloat16().float())


def test_the_wide_head_is_the_float32_product_of_the_rounded_factors() -> None:
    model = qwen2().bfloat16()
    weight = model.lm_head.weight
    widen_head(model)
    assert isinstance(model.lm_head, Float32Head)
    assert model.lm_head.weight is weight  # still tied to the embeddings
    hidden = torch.randn(3, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = hidden.double() @ weight.double().t()
    torch.testing.assert_close(model.lm_head(hidden).double(), expected, rtol=1e-5, atol=1e-6)  # far within bf16


def test_a_bias_is_added_in_float32() -> None:
    head = torch.nn.Linear(4, 5).bfloat16()
    hidden = torch.ones(2, 4).bfloat16()
    expected = hidden.float() @ head.weight.float().t() + head.bias.float()
    torch.testing.assert_close(Float32Head(head)(hidden), expected)


def test_a_float32_head_stays() -> None:
    model = qwen2()
    widen_head(model)
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.out_features == VOCABULARY


def test_torch_has_a_product_of_16_bit_factors_in_float32() -> None:
    """A head on a GPU calls it. A CPU has no kernel for it."""
    assert "out_dtype" in str(torch.ops.aten.mm.dtype._schema)
