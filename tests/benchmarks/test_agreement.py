from __future__ import annotations

import pytest
import torch

from actors.api.generation import ROLES, Role
from benchmarks.agreement import agreeing_model
from benchmarks.shapes import SHAPES

TINY = SHAPES["tiny"]


def rows(role: Role, agreement: float) -> torch.Tensor:
    """The row after each token of the common vocabulary: [V, V]."""
    model = agreeing_model(TINY, role, agreement)
    with torch.inference_mode():
        text = torch.arange(TINY.common)[:, None]
        logits: torch.Tensor = model(input_ids=text, use_cache=False).logits[:, 0, : TINY.common]
    return logits


@pytest.mark.parametrize("agreement", [0.3, 0.5, 0.8, 0.95])
def test_guider_and_combined_choice_agree_as_often_as_configured(agreement: float) -> None:
    target, guider, base = (rows(role, agreement) for role in ROLES)
    combined = target + guider - base
    torch.manual_seed(0)
    noise = -torch.log(-torch.log(torch.rand_like(combined).clamp(1e-9, 1 - 1e-7)))
    for shared in (torch.zeros_like(noise), noise):  # greedy, and temperature 1
        same = ((combined + shared).argmax(1) == (guider + shared).argmax(1)).float().mean()
        assert float(same) == pytest.approx(agreement, abs=0.03)
        alone = ((combined + shared).argmax(1) == (target + shared).argmax(1)).float().mean()
        assert alone > 0.97


def test_agreement_is_spread_over_the_text_and_no_text_repeats_itself() -> None:
    target, guider, base = (rows(role, 0.8) for role in ROLES)
    after, guessed = (target + guider - base).argmax(1), guider.argmax(1)
    token, text = 5, [5]
    while (token := int(after[token])) != 5:
        text.append(token)
        assert len(text) <= TINY.common
    assert len(text) == TINY.common
    agreed = (guessed[text] == after[text]).float()
    blocks = agreed[: len(agreed) // 50 * 50].view(-1, 50).mean(1)
    assert blocks.min() > 0.5
    assert blocks.max() < 1


def test_no_cost_is_saved() -> None:
    model = agreeing_model(TINY, "target", 0.8)
    layer = model.model.layers[1]
    for cheap in (layer.self_attn.o_proj, layer.mlp.down_proj):
        assert not cheap.weight.any()
        assert not cheap.weight.is_sparse
    assert TINY.target is not None
    assert layer.mlp.up_proj.weight.all()
    assert layer.self_attn.q_proj.weight.all()
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


@pytest.mark.parametrize("agreement", [-0.1, 1.1])
def test_an_agreement_is_a_probability(agreement: float) -> None:
    with pytest.raises(ValueError, match="a probability was expected"):
        agreeing_model(TINY, "guider", agreement)
