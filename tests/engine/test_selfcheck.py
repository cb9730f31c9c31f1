from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.engine.errors import LoadError
from actors.engine.flash import FlashAttention
from actors.engine.native_runner import NativeEngine, native_engine
from actors.engine.onednn_linear import use_onednn_linears
from actors.engine.registry import BACKENDS, BackendEntry
from actors.engine.selfcheck import relative_errors, verify_engine
from tests.support.local_service import WEIGHTS
from tests.support.tiny_models import ARCHITECTURES, llama, qwen2, wide_heads
from tests.support.varlen import emulated_flash


@pytest.mark.parametrize("options", [{}, {"batch_invariant": True}, {"backend": "gathered"}])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sound_models_pass_and_nothing_stays_in_the_cache(architecture: str, options: dict[str, Any]) -> None:
    engine = native_engine(ARCHITECTURES[architecture](), 128, **options)
    verify_engine(engine, "tiny")
    assert engine.cache_stats().sessions == 0
    engine.check()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_16_bit_models_pass(architecture: str) -> None:
    verify_engine(native_engine(ARCHITECTURES[architecture]().bfloat16(), 128), "tiny")


@pytest.mark.parametrize("role", ["target", "target_other"])
def test_16_bit_models_pass_whose_plain_forwards_differ_among_themselves(role: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS / role, dtype=torch.bfloat16)
    engine = native_engine(model, 128)
    apart = relative_errors(*engine.plain_logits(range(40)))
    assert float(apart.max()) > 0.05
    verify_engine(engine, role)


def rounding_target() -> Any:
    """A model whose plain forwards differ by .2 in bfloat16."""
    return AutoModelForCausalLM.from_pretrained(WEIGHTS / "target", dtype=torch.bfloat16)


@pytest.mark.parametrize("build", [qwen2, lambda: qwen2().bfloat16(), rounding_target], ids=["32", "16", "rounding"])
def test_state_that_leaks_between_packed_sessions_is_refused(build: Any) -> None:
    model = build()

    def leak(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + output.cumsum(1)  # as a recurrent layer does

    model.model.layers[0].mlp.register_forward_hook(leak)
    with pytest.raises(LoadError, match="packed sessions differ from plain forwards"):
        verify_engine(native_engine(model, 128), "tiny")


def test_a_layer_without_attention_is_refused() -> None:
    engine = native_engine(qwen2(), 128)
    engine.runner.hidden_layers += 1
    with pytest.raises(LoadError, match="attention ran in 2 of its 3 layers"):
        verify_engine(engine, "tiny")


def test_bits_that_depend_on_the_batch_are_refused_if_invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = native_engine(qwen2(), 128, batch_invariant=True)
    attend = engine.runner._attention.backend.attend

    def coarse(step: Any, *arguments: Any) -> torch.Tensor:
        return attend(step, *arguments) * (1 + 1e-6 * len(step.spans))

    monkeypatch.setattr(engine.runner._attention.backend, "attend", coarse)
    with pytest.raises(LoadError, match="depend on the other sessions"):
        verify_engine(engine, "tiny")


@pytest.mark.parametrize("options", [{}, {"batch_invariant": True}])
def test_weights_that_are_not_finite_are_named(options: dict[str, Any]) -> None:
    model = qwen2()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(LoadError, match=r"not finite: model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        verify_engine(native_engine(model, 128, **options), "tiny")


def test_a_packed_weight_that_is_not_finite_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.engine.native_runner.use_onednn_linears", partial(use_onednn_linears, smallest=1))
    model = llama()
    model.lm_head.weight.data[3, 5] = float("inf")
    with pytest.raises(LoadError, match=r"lm_head\.weight holds NaN or infinite values"):
        verify_engine(native_engine(model, 128), "tiny")


def test_finite_weights_whose_logits_overflow_are_refused_with_a_wider_dtype() -> None:
    model = qwen2().half()
    model.model.norm.weight.data.fill_(6e4)
    with pytest.raises(LoadError, match=r"not finite in float16, though its weights are.*dtype: bfloat16"):
        verify_engine(native_engine(model, 128), "tiny")


def test_a_cache_too_small_for_two_short_sequences_is_refused() -> None:
    with pytest.raises(LoadError, match="cache_tokens: 64 tokens do not hold"):
        verify_engine(native_engine(qwen2(), 64), "tiny")


def _flash(monkeypatch: pytest.MonkeyPatch, op: Any, model: Any) -> NativeEngine:
    monkeypatch.setitem(BACKENDS, "flash", BackendEntry(lambda: FlashAttention(op), lambda device, dtype: True))
    return native_engine(model, 128, backend="flash", graphs=True)


@pytest.mark.parametrize("window", [None, 6])
def test_a_fused_back_end_that_keeps_the_semantics_passes(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    engine = _flash(monkeypatch, emulated_flash, wide_heads(window))
    verify_engine(engine, "tiny")
    assert engine.runner.attention.static
    assert engine.cache_stats().sessions == 0


@pytest.mark.parametrize("change", ["starts", "window", "lengths", "scale"])
def test_a_fused_back_end_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """Like a back end that uses differences of starts as lengths, or ignores lengths."""

    def other(*arguments: Any, **named: Any) -> Any:
        query, keys, values, cu_q, starts, *rest = arguments
        if change == "starts":
            starts = starts.sort().values
        elif change == "window":
            named["window_size_left"] = None
        elif change == "lengths":
            named["seqused_k"] = (named["seqused_k"] - 1).clamp(min=0)
        else:
            named["scale"] = 1.0
        return emulated_flash(query, keys, values, cu_q, starts, *rest, **named)

    with pytest.raises(LoadError, match=r"differs from SDPA.*Set attention: gathered"):
        verify_engine(_flash(monkeypatch, other, wide_heads()), "tiny")


def test_buckets_that_give_other_rows_are_refused() -> None:
    engine = native_engine(qwen2(), 128, graphs=True)
    assert engine.runner.graphs is not None
    run = engine.runner.graphs.run

    def stale(batch: Any) -> torch.Tensor | None:
        rows = run(batch)
        return None if rows is None else rows.roll(1, 0) + 0.1 * torch.arange(rows.shape[1])

    engine.runner.graphs.run = stale  # type: ignore[method-assign]
    with pytest.raises(LoadError, match="steps in buckets differ"):
        verify_engine(engine, "tiny")
