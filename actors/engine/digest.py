"""A digest of a model, with which running hashes of tokens start, so that caches of different models never match."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAMPLES = 64  # values of every parameter: enough to tell checkpoints apart
# Keys of a config that depend on the machine.
_LOCAL = ("_name_or_path", "transformers_version", "_attn_implementation", "distributed_config")


def model_digest(model: PreTrainedModel) -> int:
    """A 64-bit digest of a transformers model's config, adapters and weights, the same after every restart.

    It covers the name, shape, dtype and 64 values of each parameter.
    """
    digest = hashlib.blake2b(digest_size=8)
    config = {key: value for key, value in model.config.to_dict().items() if key not in _LOCAL}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.numel() and not parameter.is_meta:
            digest.update(_bits(parameter.detach(), _spread(parameter.numel())).cpu().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little")


def files_digest(config: Mapping[str, Any], files: Iterable[Path], kind: str) -> int:
    """As `model_digest`, of the tensors in safetensors files, for an engine that arranges weights in a way of its own.

    kind: of that engine, whose digests differ from all others.
    """
    digest = hashlib.blake2b(kind.encode(), digest_size=8)
    stated = {key: value for key, value in config.items() if key not in _LOCAL}
    digest.update(json.dumps(stated, sort_keys=True, default=str).encode())
    for name, tensor in _stored(files):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.numel():
            digest.update(_bits(tensor, _spread(tensor.numel())).numpy().tobytes())
    return int.from_bytes(digest.digest(), "little")


def non_finite_tensor(files: Iterable[Path]) -> str | None:
    """Name of the first tensor in safetensors files that holds NaN or infinite values; None if there is none."""
    finite = (torch.float32, torch.bfloat16, torch.float16)
    return next(
        (name for name, tensor in _stored(files) if tensor.dtype in finite and not bool(tensor.isfinite().all())), None
    )


def _stored(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of files, which are mapped and not read."""
    for file in sorted(files):
        with safe_open(file, framework="pt") as opened:
            for name in sorted(opened.keys()):
                yield name, opened.get_tensor(name)


def _spread(count: int) -> Tensor:
    """Indices of values that stand for a weight of `count` values."""
    return torch.linspace(0, count - 1, min(_SAMPLES, count), dtype=torch.float64).long()


def _bits(parameter: Tensor, index: Tensor) -> Tensor:
    """The bytes of a parameter's values at flat indices."""
    return parameter.flatten()[index.to(parameter.device)].contiguous().view(torch.uint8)
