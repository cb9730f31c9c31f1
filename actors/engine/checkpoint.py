"""Compares the tensors of a checkpoint and of an adapter with the model that config.json describes.

transformers and PEFT skip tensors that the model does not take, and the self-check cannot see it, since it compares the
model with itself. Here the same loading code runs on the meta device with the shapes of the files' headers, so that
names, renamings, fused experts and tied weights are those of the real load, and no tensor is read.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import dot_natural_key
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import logging as transformers_logging

from actors.engine.compat import refuse_adapter
from actors.engine.errors import LoadError, first_line
from actors.engine.weight_files import (
    ADAPTER_CONFIG,
    TensorHeader,
    WeightsError,
    adapter_file,
    read_headers,
    weight_files,
)

# Buffers of older releases, which models compute themselves today.
_HARMLESS = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.(attn|attention)\.(masked_)?bias$")
_SIZE_MISMATCH = re.compile(r"size mismatch for (\S+): .*?Size\(\[(.*?)\]\).*?Size\(\[(.*?)\]\)")  # load_state_dict's
_RESTORE = (
    "Correct its config.json (architecture, layers, quantization_config), or restore the files that belong to it."
)
_ADAPTER = "default"  # PEFT's name of an adapter in memory; files do not have it


def verify_checkpoint(config: Any, folder: Path, name: str, *, trust_remote_code: bool = False) -> list[str]:
    """Raise LoadError if the tensors in a checkpoint's headers are not exactly those of the model of this config.

    config: a transformers config. name: the model's, for messages. Returns warnings, where they cannot be compared.
    """
    quantized = refuse_unknown_quantization(config, name)
    try:
        headers = read_headers(weight_files(folder))
    except WeightsError as error:
        raise LoadError(name, str(error), must_hold(folder)) from error
    expected = _skeleton(config, name, trust_remote_code)
    with _report_captured() as report:
        try:
            _, info = type(expected).from_pretrained(
                None,
                config=config,
                state_dict={key: _placeholder(tensor) for key, tensor in headers.items()},
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as error:  # of any model's code, which may not run without weights or on this machine
            if not quantized and (failed := _failed_conversion(report)):
                raise LoadError(name, failed, _RESTORE) from error
            return [f"its tensors were not compared with its config.json: {first_line(error)}"]
    refuse_tensors(info, name)
    if not quantized:
        _refuse_integers(headers, expected, name)
    return []


def refuse_tensors(info: Mapping[str, Any], name: str) -> None:
    """Raise LoadError for tensors that were not loaded as the model needs them. info: transformers' loading info."""
    mismatched = {key: (tuple(theirs), tuple(ours)) for key, theirs, ours in info["mismatched_keys"]}
    if mismatched:
        first = min(mismatched, key=dot_natural_key)
        theirs, ours = mismatched[first]
        why = f"{first} has shape {theirs} in its files and {ours} by its config.json"
        raise LoadError(name, why + _more(mismatched, "tensors differ"), _RESTORE)
    unexpected = [key for key in info["unexpected_keys"] if not _HARMLESS.search(key)]
    if unexpected:
        why = f"its files hold {min(unexpected, key=dot_natural_key)}, which the model of its config.json does not take"
        raise LoadError(name, why + _more(unexpected, "such tensors"), _RESTORE)
    if missing := sorted(info["missing_keys"], key=dot_natural_key):
        why = f"its checkpoint lacks {len(missing)} weights, {missing[0]} among them"
        raise LoadError(name, why, "Restore its *.safetensors, or correct its config.json.")


def refuse_unknown_quantization(config: Any, name: str) -> bool:
    """True if a config names a quantisation. Raises LoadError for one that transformers would skip with a warning."""
    text = config.get_text_config(decoder=True)
    stated = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)
    if not stated:
        return False
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING  # takes seconds; few models need it

    settings = stated if isinstance(stated, Mapping) else stated.to_dict()
    method = settings.get("quant_method")
    if not (settings.get("load_in_8bit") or settings.get("load_in_4bit")) and (
        str(getattr(method, "value", method)) not in AUTO_QUANTIZATION_CONFIG_MAPPING
    ):
        why = f"its quantization_config has the quant_method {method!r}, which transformers does not know"
        known = ", ".join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))
        raise LoadError(name, why, f"Choose a checkpoint without quantization, or with one of {known}.")
    return True


def verify_adapter(config: Any, folder: Path, model: str, *, trust_remote_code: bool = False) -> list[str]:
    """Raise LoadError if the adapter in a folder is no LoRA, or its tensors are not exactly those of its config.

    config: the transformers config of its base model, which is called `model`. Returns warnings.
    """
    name = f"adapter {folder}"
    out = f"Give the folder with the adapter_config.json and adapter_model.safetensors that were trained on {model}."
    try:
        file = adapter_file(folder)
        headers = read_headers([file])
        settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (WeightsError, ValueError) as error:
        raise LoadError(name, str(error), out) from error
    refuse_adapter(settings, name)
    tensors = {key: _placeholder(tensor) for key, tensor in headers.items()}
    base = _skeleton(config, model, trust_remote_code)
    with _report_captured(), warnings.catch_warnings(action="ignore"):
        try:
            unexpected, missing = _load_adapter_shapes(base, folder, tensors)
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            raise LoadError(name, _adapter_error(error), out) from error
    if unexpected:
        why = f"it holds {unexpected[0]}, which its target_modules on this model do not take"
        raise LoadError(name, why + _more(unexpected, "such tensors"), out)
    if missing:
        raise LoadError(name, f"it lacks {missing[0]}" + _more(missing, "tensors are missing"), out)
    return ["its adapter changes nothing: every lora_B is zero"] if _is_zero(file, headers) else []


def _load_adapter_shapes(
    base: PreTrainedModel, folder: Path, tensors: Mapping[str, Tensor]
) -> tuple[list[str], list[str]]:
    """PEFT's load of an adapter on the meta device: names that the model does not take, and names that are missing."""
    from peft import PeftConfig, PeftModel, set_peft_model_state_dict  # takes seconds, and few models need it

    config = PeftConfig.from_pretrained(str(folder))
    config.init_lora_weights = True  # others compute on the base model's weights, which are not there
    config.inference_mode = True
    adapted = PeftModel(base, config, _ADAPTER, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
    result = set_peft_model_state_dict(adapted, dict(tensors), _ADAPTER, low_cpu_mem_usage=True)
    missing = [key for key in result.missing_keys if "lora_" in key and f".{_ADAPTER}" in key]
    return _as_in_file(result.unexpected_keys), _as_in_file(missing)


def _as_in_file(keys: list[str]) -> list[str]:
    """PEFT's names in memory as its files have them, in order."""
    return sorted((key.replace(f".{_ADAPTER}", "") for key in keys), key=dot_natural_key)


def _adapter_error(error: Exception) -> str:
    """The reason in an error of PEFT or torch; of shapes that differ, the first."""
    if isinstance(error, KeyError):
        return f"it lacks {error.args[0]}"
    if differs := _SIZE_MISMATCH.search(str(error)):
        key, theirs, ours = differs.groups()
        return f"{_as_in_file([key])[0]} has shape ({theirs}) in its file and ({ours}) on this model"
    return first_line(error).rstrip(".")


def _is_zero(file: Path, headers: Mapping[str, TensorHeader]) -> bool:
    """True if the factors of a LoRA that start as zeros still are: only these tensors are read, to the first value."""
    starting = [key for key in headers if ".lora_B." in key or ".lora_embedding_A" in key]
    if any(".lora_" not in key or ".lora_magnitude" in key for key in headers):
        return False
    with safe_open(file, framework="pt") as tensors:
        return not any(bool(tensors.get_tensor(key).any()) for key in starting)


def _skeleton(config: Any, name: str, trust_remote_code: bool) -> PreTrainedModel:
    """The model of a config without memory for its weights. Raises LoadError if transformers cannot build it."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # of any model's code
        raise LoadError(name, f"its config.json gives no model: {first_line(error)}", _RESTORE) from error
    return model


def _placeholder(tensor: TensorHeader) -> Tensor:
    """A tensor of this shape and dtype without memory."""
    return torch.empty(tensor.shape, dtype=str_to_torch_dtype.get(tensor.dtype, torch.uint8), device="meta")


def _refuse_integers(headers: Mapping[str, TensorHeader], model: PreTrainedModel, name: str) -> None:
    """Raise LoadError for weights that are stored as integers, which no quantization_config explains."""
    expected = model.state_dict()
    for key in sorted(headers.keys() & expected.keys(), key=dot_natural_key):
        if expected[key].is_floating_point() and not _placeholder(headers[key]).is_floating_point():
            why = f"{key} is stored as {headers[key].dtype} and its config.json has no quantization_config"
            raise LoadError(name, why, _RESTORE)


@contextmanager
def _report_captured() -> Iterator[list[str]]:
    """Keep the lines of transformers' loading report instead of printing them, and show no progress."""
    lines: list[str] = []
    logger, shown = logging.getLogger("transformers.modeling_utils"), transformers_logging.is_progress_bar_enabled()

    def keep(record: logging.LogRecord) -> bool:
        lines.extend(record.getMessage().splitlines())
        return False

    logger.addFilter(keep)
    transformers_logging.disable_progress_bar()
    try:
        yield lines
    finally:
        logger.removeFilter(keep)
        if shown:
            transformers_logging.enable_progress_bar()


def _failed_conversion(report: list[str]) -> str | None:
    """The first tensor that transformers could not convert according to its report, and why; None if there is none."""
    first = next((line.split("|")[0].strip() for line in report if "| CONVERSION" in line), None)
    why = next((line for line in report if re.match(r"\w*Error: ", line)), "")
    return None if first is None else f"its files do not convert to {first}: {why.strip()}"


def _more(every: Any, noun: str) -> str:
    return f" ({len(every)} {noun})" if len(every) > 1 else ""


def must_hold(folder: Path | str) -> str:
    """The remedy for a folder whose files cannot be loaded."""
    return f"The folder {folder} must hold config.json and its *.safetensors, whole and readable."
