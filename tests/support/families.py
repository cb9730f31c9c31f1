"""Trios whose target has another vocabulary: a random target with the small pair of the embedded trio."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from actors.api.generation import Role
from actors.config import ServiceConfig
from actors.replica.build import load_role
from actors.replica.engine_thread import Engine
from actors.text.tokenizer import RoleTokenizer
from tests.support.local_service import trio_config

TEMPLATE = """\
{%- for message in messages %}{{- '[' + message.role + '] ' + message.content + '\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '[assistant] ' }}{%- endif %}"""


def write_target(folder: Path, tokenizer: RoleTokenizer, seed: int = 5) -> Path:
    """Write a checkpoint of random weights with this tokenizer. Returns its folder."""
    torch.manual_seed(seed)
    ends = list(tokenizer.eos_ids)
    config = Qwen2Config(
        vocab_size=tokenizer.width,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
    model = Qwen2ForCausalLM(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.25)  # rows that prefer something
    model.save_pretrained(folder)
    tokenizer._tokenizer.save(str(folder / "tokenizer.json"))
    end = tokenizer.decode(ends, skip_special=False)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def with_target(folder: Path, **overrides: object) -> ServiceConfig:
    """The embedded trio's configuration with another target."""
    return trio_config(**overrides).with_target(str(folder))


def engines(config: ServiceConfig, small: Mapping[Role, Engine]) -> dict[Role, Engine]:
    """Engines of a configuration: a new target's, and the given small ones."""
    return {**small, "target": load_role(config, "target")}
