"""Steps of the native engine on fake CUDA tensors: no GPU is needed, devices are tracked, and no value is computed.

    python -m tests.support.fake_cuda GUARD.so

GUARD.so is cuda_guard.cpp, compiled. Prints a JSON object: by step the operations that copy between host and device,
wait for the device, or mix tensors of both. It has a process of its own, in which torch believes that there is a GPU.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Qwen2Config

import actors.engine.registry as registry
import actors.engine.rows as rows
from actors.decoding.hashing import extend_hashes
from actors.engine import graphs, inputs, native_runner
from actors.engine.interface import Extend, Held
from actors.engine.native_runner import NativeEngine, native_engine

WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.unique", "aten.item")
SHAPE: dict[str, Any] = {
    "vocab_size": 2_048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


class Watch(TorchDispatchMode):
    """Records operations that cost a wait or a copy."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        places = {leaf.device.type for leaf in [*read, *tree_leaves(out)] if isinstance(leaf, Tensor)}
        if len(places) > 1:
            copied = name.startswith(("aten._to_copy", "aten.copy_", "aten.to."))
            self.found.append("copy" if copied else f"mix {name} {[tuple(leaf.shape) for leaf in read]}")
        elif places == {"cuda"} and name.startswith(WAITS):
            self.found.append(f"wait {name}")
        return out


def fake_engine() -> NativeEngine:
    """A tiny model in bfloat16 on fake CUDA memory, with FlashAttention."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPE), dtype=torch.bfloat16)
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                empty = torch.empty(weight.shape, dtype=weight.dtype, device="cuda")
                module._parameters[name] = torch.nn.Parameter(empty, requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
    return native_engine(model, 4_096, max_held_rows=256, digest=1, graphs=False)


def extend(session: int, position: int, count: int, rows_: int) -> Extend:
    tokens = list(range(1, position + 1))
    prefix = [1, *extend_hashes(1, tokens)][position]
    return Extend(session, position, prefix, list(range(position + 1, position + count + 1)), rows_, session)


STEPS = {
    "two prompts": [extend(1, 0, 40, 1), extend(2, 0, 5, 2)],
    "a decode step": [extend(1, 40, 1, 1)],
    "a check of drafts": [extend(2, 5, 4, 4)],
    "a mix of all": [extend(1, 41, 1, 1), extend(2, 9, 5, 5), extend(3, 0, 30, 1)],
}


@contextmanager
def without_a_gpu(guard: str) -> Iterator[list[str]]:
    """Replaces what needs a driver: pinned memory, and reading values on the host, which is recorded."""
    ctypes.CDLL(guard)
    torch._C._ensureCUDADeviceGuardSet()
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    properties: Any = SimpleNamespace(uuid="fake", total_memory=80 << 30)
    torch.cuda.get_device_properties = lambda device=None: properties
    flash = replace(registry.BACKENDS["flash"], supports=lambda device, dtype: device.type == "cuda")
    registry.BACKENDS["flash"] = flash
    read: list[str] = []

    def upload(numbers: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)

    def to_host(tensor: Tensor) -> Any:
        read.append(tensor.device.type)
        return np.zeros(tensor.shape, {torch.int32: np.int32}.get(tensor.dtype, np.float32))

    for module in (inputs, native_runner, graphs, rows):
        if hasattr(module, "upload"):
            module.upload = upload  # type: ignore[attr-defined]
    rows.to_host = to_host
    yield read


def main() -> None:
    found: dict[str, list[str]] = {}
    with without_a_gpu(sys.argv[1]) as read, FakeTensorMode():
        engine = fake_engine()
        assert engine.runner.attention.name == "flash"
        for name, batch in STEPS.items():
            with Watch() as watch:
                outcomes = engine.extend(batch)
            assert all(isinstance(outcome, Held) for outcome in outcomes), outcomes
            found[name] = watch.found
        sessions = [extend.session for extend in STEPS["a mix of all"]]
        with Watch() as watch:
            engine.reduce(sessions, 128, [0.6] * 7)
        found["a reduction"] = [*watch.found, *(f"read {each}" for each in read)]
        read.clear()
        held = engine.rows(2)
        assert held is not None
        with Watch() as watch:
            engine.values([(held, 0), (held, 1)], [3, 4], np.arange(7))
        found["a look-up"] = [*watch.found, *(f"read {each}" for each in read)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
