"""A digest of a model, from which running hashes of tokens begin: caches of different models never match."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAMPLES = 64  # values read of every parameter: enough to tell checkpoints apart without reading them whole
_PRIVATE = ("_name_or_path", "transformers_version", "_attn_implementation")  # where and how it is run


def model_digest(model: PreTrainedModel) -> int:
    """64 bits of a transformers model's config, adapters and weights; the same after every restart.

    Of each parameter the name, shape, dtype and 64 values spread over it are read.
    """
    digest = hashlib.blake2b(digest_size=8)
    config = {key: value for key, value in model.config.to_dict().items() if key not in _PRIVATE}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.numel() and not parameter.is_meta:
            flat = parameter.detach().flatten()
            spread = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64)
            values = flat[spread.long().to(flat.device)].contiguous()
            digest.update(values.view(torch.uint8).cpu().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little")
