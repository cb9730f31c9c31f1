from __future__ import annotations

from typing import Any

import pytest
import torch

from actors.engine.errors import LoadError
from actors.engine.selfcheck import verify_engine
from actors.engine.step_engine import StepEngine
from tests.engine.models import ARCHITECTURES, qwen2


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"backend": "gathered"}])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sound_models_pass_and_nothing_stays_in_the_cache(architecture: str, options: dict[str, Any]) -> None:
    engine = StepEngine(ARCHITECTURES[architecture](), 128, **options)
    verify_engine(engine, "tiny")
    assert engine.cache_stats().sessions == 0
    engine.check()


def test_a_16_bit_model_passes() -> None:
    verify_engine(StepEngine(qwen2().bfloat16(), 128), "tiny")


def test_state_that_leaks_between_packed_sessions_is_refused() -> None:
    model = qwen2()

    def leak(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + output.cumsum(1)  # as a recurrent layer does

    model.model.layers[0].mlp.register_forward_hook(leak)
    with pytest.raises(LoadError, match="packed sessions differ from plain forwards"):
        verify_engine(StepEngine(model, 128), "tiny")


def test_a_layer_without_attention_is_refused() -> None:
    engine = StepEngine(qwen2(), 128)
    engine.hidden_layers += 1
    with pytest.raises(LoadError, match="attention ran in 2 of its 3 layers"):
        verify_engine(engine, "tiny")


def test_bits_that_depend_on_company_are_refused_in_exact_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = StepEngine(qwen2(), 128, exact=True)
    attend = engine._attention.backend.attend

    def coarse(step: Any, *arguments: Any) -> torch.Tensor:
        return attend(step, *arguments) * (1 + 1e-6 * len(step.spans))

    monkeypatch.setattr(engine._attention.backend, "attend", coarse)
    with pytest.raises(LoadError, match="depend on the company"):
        verify_engine(engine, "tiny")


def test_a_cache_too_small_for_two_short_sequences_is_refused() -> None:
    with pytest.raises(LoadError, match="cache_tokens: 64 tokens do not hold"):
        verify_engine(StepEngine(qwen2(), 64), "tiny")
