"""Tiny models with random weights of the architectures that the engine serves, and a driver of sessions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from actors.decoding.hashing import extend_hashes
from actors.engine.interface import BLOCK, Extend, Outcome
from actors.engine.step_engine import StepEngine

VOCABULARY = 509  # not a multiple of a vector's width: the tail of a row is computed in another way
WINDOW = 6
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def qwen2() -> Any:
    return _build(Qwen2ForCausalLM, Qwen2Config(**_SHAPE, tie_word_embeddings=True))


def llama() -> Any:
    return _build(LlamaForCausalLM, LlamaConfig(**_SHAPE))


def gemma2() -> Any:
    """Soft-capped scores and logits, alternating sliding and full layers."""
    config = Gemma2Config(
        **_SHAPE, head_dim=16, sliding_window=WINDOW, attn_logit_softcapping=5.0, final_logit_softcapping=4.0
    )
    return _build(Gemma2ForCausalLM, config)


def mistral() -> Any:
    """Every layer has a sliding window."""
    return _build(MistralForCausalLM, MistralConfig(**_SHAPE, sliding_window=WINDOW))


def wide_heads(window: int | None = None) -> Any:
    """Heads of width 16, which fused kernels accept; with `window`, every layer has a sliding window."""
    if window is None:
        return _build(LlamaForCausalLM, LlamaConfig(**_SHAPE, head_dim=16))
    return _build(MistralForCausalLM, MistralConfig(**_SHAPE, head_dim=16, sliding_window=window))


ARCHITECTURES = {"qwen2": qwen2, "llama": llama, "gemma2": gemma2, "mistral": mistral}


def _build(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = kind(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (count,), generator=generator).tolist()


class Driver:
    """Keeps the tokens of sessions, like a coordinator, and makes extends of them."""

    def __init__(self, engine: StepEngine[Any]) -> None:
        self.engine = engine
        self.tokens: dict[int, list[int]] = {}

    def make(
        self, session: int, new: Sequence[int], rows: int | None = None, at: int | None = None, age: int | None = None
    ) -> Extend:
        """An extend at the end of the session, or at position `at` after a rewind. rows None: all rows."""
        held = self.tokens.setdefault(session, [])
        del held[len(held) if at is None else at :]
        hashes = [self.engine.hash_seed, *extend_hashes(self.engine.hash_seed, held)]
        extend = Extend(
            session,
            position=len(held),
            prefix=hashes[-1],
            tokens=list(new),
            rows=len(new) if rows is None else rows,
            age=session if age is None else age,
        )
        held += new
        return extend

    def extend(self, session: int, new: Sequence[int], rows: int | None = None, at: int | None = None) -> Outcome:
        """Extend one session by itself."""
        return self.engine.extend([self.make(session, new, rows, at)])[0]

    def blocks(self, session: int) -> list[int]:
        """The running hash after each whole block of the session's tokens."""
        return extend_hashes(self.engine.hash_seed, self.tokens[session])[BLOCK - 1 :: BLOCK]

    def logits(self, session: int) -> torch.Tensor:
        """The held logits [m, V] of the session."""
        return torch.from_numpy(self.engine.whole([session]).copy())
