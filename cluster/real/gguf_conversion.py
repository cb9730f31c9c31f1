"""Converts a GGUF file to a folder of Hugging Face layout, with transformers' own reader."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.real.models import RealModelError


def convert_gguf(file: Path, folder: Path) -> None:
    """Write config, float32 weights, generation config and tokenizer of a GGUF file to a new folder.

    The weights are the dequantised ones, bit for bit. Raises RealModelError where transformers cannot read the file.
    """
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise RealModelError(f"transformers cannot read {file.name}: {error}") from error
    config = quantised.config
    del config.quantization_config  # save_pretrained refuses a model that says that it is quantised
    config._name_or_path = ""
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(quantised.state_dict())
    plain.generation_config = quantised.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
