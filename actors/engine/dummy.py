"""Models with random weights of a published config, for measurements without a download."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEED = 0  # the same weights after every start, so that caches and hashes of replicas match


def dummy_model(config: Any, device: str, dtype: str = "auto", *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model of a transformers config with random weights, drawn on `device` as before a training.

    No weights are made on the host first. dtype "auto" is the one that the config names, float32 if none. Tied weights
    stay tied. The same config, dtype and kind of device always give the same weights.
    """
    kind = getattr(torch, dtype) if dtype != "auto" else config.get_text_config().dtype or config.dtype
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=kind or torch.float32, trust_remote_code=trust_remote_code
        )
    model.to_empty(device=device)
    model.tie_weights()
    devices = [torch.cuda.current_device()] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(SEED)
        model.initialize_weights()  # buffers that a checkpoint does not hold, too
    return model
