"""A service with vocabularies as wide as published models', without weights: made-up words and a configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from actors.api.generation import ROLES, Generate
from actors.api.guidance import Guidance
from actors.api.sampling_params import Sampling, Thinking
from actors.config import ServiceConfig, load_config
from benchmarks.null_engine import PUBLISHED_WIDTH


def wide_config(folder: Path, width: int = PUBLISHED_WIDTH, **overrides: Any) -> ServiceConfig:
    """The configuration of a trio with `width` tokens, whose vocabulary is written into `folder`."""
    words = {f"<{token:x}>": token for token in range(width)}
    vocabulary = models.WordLevel(words, unk_token="<0>")  # noqa: S106  # a word, no password
    Tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    settings = {"vocab_size": width, "max_position_embeddings": 1 << 15}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    each = {"path": str(folder), "cache_tokens": 1 << 20}
    return load_config({"version": 1, "models": dict.fromkeys(ROLES, each)} | overrides)


def guided_request(request_id: str, prompt: list[int], tokens: int, temperature: float, alpha: float = 1.0) -> Generate:
    """A guided generation of exactly `tokens` tokens after the same prompt in every role."""
    return Generate(
        request_id=request_id,
        primary="target",
        prompts=dict.fromkeys(ROLES, prompt),
        sampling=Sampling(temperature=temperature, max_tokens=tokens, ignore_eos=True),
        guidance=Guidance(alpha=alpha),
        thinking=Thinking(),
        seed=7,
    )
