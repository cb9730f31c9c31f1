"""Steps of the native engine on fake CUDA tensors: no GPU is needed, devices are tracked, and no value is computed.

    python -m tests.support.fake_cuda GUARD.so

GUARD.so is cuda_guard.cpp, compiled. Prints a JSON object: by step what was done on which stream, in order. "kernels"
are operations on the device alone; others copy between host and device, wait for the device, mix tensors of both, or
order the streams by an event. It has a process of its own, in which torch believes that there is a GPU.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
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


TRACE: list[str] = []


class FakeEvent:
    """Recorded behind the forward `number`. over: the device has come so far."""

    def __init__(self, number: int) -> None:
        self.number, self.over = number, False

    def query(self) -> bool:
        return self.over


class FakeStream:
    """A stream whose events are numbered."""

    current: FakeStream

    def __init__(self, device: torch.device | None = None, priority: int = 0) -> None:
        self.name = "look-ups" if priority < 0 else "forwards"
        self.events: list[FakeEvent] = []

    def record_event(self) -> FakeEvent:
        self.events.append(FakeEvent(len(self.events) + 1))
        note(f"record {len(self.events)}")
        return self.events[-1]

    def wait_event(self, event: FakeEvent) -> None:
        TRACE.append(f"{self.name}: wait for {event.number}")

    @contextmanager
    def as_current(self) -> Iterator[None]:
        before, FakeStream.current = FakeStream.current, self
        yield
        FakeStream.current = before


FakeStream.current = FakeStream()


def note(action: str) -> None:
    """Add what the current stream does to the trace."""
    line = f"{FakeStream.current.name}: {action}"
    if action != "kernels" or TRACE[-1:] != [line]:
        TRACE.append(line)


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds operations to the trace."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        places = {leaf.device.type for leaf in [*read, *tree_leaves(out)] if isinstance(leaf, Tensor)}
        if len(places) > 1:
            copied = name.startswith(("aten._to_copy", "aten.copy_", "aten.to."))
            note("copy" if copied else f"mix {name} {[tuple(leaf.shape) for leaf in read]}")
        elif places == {"cuda"}:
            note(f"wait {name}" if name.startswith(WAITS) else "kernels")
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
    native_runner.model_digest = lambda model: 1  # type: ignore[attr-defined]  # the values of fake weights cannot be read
    return native_engine(model, 4_096, max_held_rows=256, graphs=False)


def extend(session: int, position: int, count: int, rows_: int) -> Extend:
    tokens = list(range(1, position + 1))
    prefix = [1, *extend_hashes(1, tokens)][position]
    return Extend(session, position, prefix, list(range(position + 1, position + count + 1)), rows_, session)


STEPS = {
    "a prompt": [extend(4, 0, 8, 1)],
    "two prompts": [extend(1, 0, 40, 1), extend(2, 0, 5, 2)],
    "a decode step": [extend(1, 40, 1, 1)],
    "a check of drafts": [extend(2, 5, 4, 4)],
    "a mix of all": [extend(1, 41, 1, 1), extend(2, 9, 5, 5), extend(3, 0, 30, 1)],
}


@contextmanager
def without_a_gpu(guard: str) -> Iterator[None]:
    """Replaces what needs a driver: streams, pinned memory, and reading values on the host."""
    ctypes.CDLL(guard)
    torch._C._ensureCUDADeviceGuardSet()
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    properties: Any = SimpleNamespace(uuid="fake", total_memory=80 << 30)
    torch.cuda.get_device_properties = lambda device=None: properties
    flash = replace(registry.BACKENDS["flash"], supports=lambda device, dtype: device.type == "cuda")
    registry.BACKENDS["flash"] = flash
    cuda: Any = torch.cuda
    cuda.Stream, cuda.stream, cuda.current_stream = FakeStream, FakeStream.as_current, lambda device: FakeStream.current

    def upload(numbers: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)

    def to_host(tensor: Tensor) -> Any:
        note(f"read {tensor.device.type}")
        return np.zeros(tensor.shape, {torch.int32: np.int32}.get(tensor.dtype, np.float32))

    for module in (inputs, native_runner, graphs, rows):
        if hasattr(module, "upload"):
            module.upload = upload  # type: ignore[attr-defined]
    rows.to_host = to_host
    yield


def main() -> None:
    found: dict[str, list[str]] = {}

    def trace(name: str, work: Callable[[], Any]) -> Any:
        TRACE.clear()
        with Watch():  # type: ignore[no-untyped-call]
            outcome = work()
        found[name] = TRACE.copy()
        return outcome

    with without_a_gpu(sys.argv[1]), FakeTensorMode():
        engine = fake_engine()
        assert engine.runner.attention.name == "flash"
        for name, batch in STEPS.items():
            outcomes = trace(name, partial(engine.extend, batch))
            assert all(isinstance(outcome, Held) for outcome in outcomes), outcomes
        trace("a reduction", lambda: engine.reduce([1, 2, 3], 128, [0.6] * 7))
        trace("a reduction of rows apart", lambda: engine.reduce([3, 1], 128))
        two, four = engine.rows(2), engine.rows(4)
        assert two is not None
        assert four is not None
        trace("a look-up", lambda: engine.values([(two, 0), (two, 1)], [3, 4], np.arange(7)))
        trace("a look-up in two forwards' rows", lambda: engine.values([(two, 0), (four, 0)], [3, 4], np.arange(7)))
        trace("a widening", lambda: two.slices(128, [1]))
        trace("a whole row", lambda: two.whole([1]))
        key = two.position, two.hashes[0]
        found["found while computed"] = [str(two.index(*key))]
        FakeStream.current.events[-1].over = True
        found["found afterwards"] = [str(two.index(*key))]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
