"""Small steps in a few fixed shapes, each captured once as a CUDA graph and replayed.

Decoding steps and checks of drafts launch about a thousand kernels that take less time than launching them does. Their
batches are padded to a bucket, whose inputs are one static tensor; prompts and larger steps run as they are. On a CPU
the same buckets run as plain calls.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from actors.engine.attention import Span
from actors.engine.inputs import Batch, Layout, upload
from actors.engine.memory import GRAPHS

log = logging.getLogger(__name__)

# New tokens of a sequence: 1 decodes, more check drafts. Two or three rows cost more than four.
MAX_Q = (1, 4, 8)
MAX_SEQUENCES = 64
# Tokens held by a sequence: the kernel's host integer is frozen at capture.
MAX_K = (1_024, 4_096, 16_384, 65_536, 262_144)

Compute = Callable[[Layout, Tensor, Sequence[Span]], Tensor]


def bucket(batch: Batch) -> Layout | None:
    """The smallest bucket that a batch fits, None if it fits none."""
    sequences = _power_of_two(len(batch.spans))
    max_q = next((size for size in MAX_Q if size >= batch.max_q), None)
    max_k = next((size for size in MAX_K if size >= batch.max_k), None)
    if max_q is None or max_k is None or not 0 < len(batch.spans) <= MAX_SEQUENCES:
        return None
    # One session's check among many that decode must not multiply the tokens of all.
    tokens = sequences if max_q == 1 else max(_power_of_two(len(batch.ids)), max_q)
    return Layout(tokens, tokens, sequences, max_q, max_k)


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


class Runner(Protocol):
    """Runs a batch that was padded to a layout."""

    def run(self, layout: Layout, numbers: list[int], spans: Sequence[Span]) -> Tensor:
        """Logits [layout.rows, V] float32, which the next run may overwrite. Raises CaptureFailed."""
        ...


class CaptureFailed(RuntimeError):
    """A graph could not be captured; the step itself was not computed by it."""


class GraphBuckets:
    """Steps that fit a bucket, run by `runner`; after a capture that failed, none."""

    def __init__(self, runner: Runner, trash: int) -> None:
        self.runner: Runner | None = runner
        self._trash = trash

    def run(self, batch: Batch) -> Tensor | None:
        """Logits [R, V] of the tokens to keep, in memory of their own; None if the batch must run as it is."""
        layout = bucket(batch)
        if layout is None or self.runner is None:
            return None
        try:
            logits = self.runner.run(layout, layout.flatten(batch, self._trash), batch.spans)
        except CaptureFailed as error:
            log.warning("no CUDA graphs from now on, steps take longer: %s", error)
            self.runner = None
            return None
        return logits[: len(batch.keep)].clone()


class PlainRunner:
    """Computes a bucket by an ordinary forward."""

    def __init__(self, compute: Compute, device: torch.device) -> None:
        self._compute, self._device = compute, device

    def run(self, layout: Layout, numbers: list[int], spans: Sequence[Span]) -> Tensor:
        return self._compute(layout, upload(numbers, self._device), spans)


class CapturedRunner:
    """Captures a bucket when it is first met and replays it afterwards; the least recently used graph goes first.

    All graphs share one memory pool, and those of as many rows one output: it is copied before another is replayed.
    """

    def __init__(self, compute: Compute, device: torch.device, most: int = GRAPHS) -> None:
        self._compute, self._device, self._most = compute, device, most
        self._graphs: OrderedDict[Layout, tuple[torch.cuda.CUDAGraph, Tensor]] = OrderedDict()
        self._outputs: dict[int, Tensor] = {}  # by number of rows
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, layout: Layout, numbers: list[int], spans: Sequence[Span]) -> Tensor:
        flat = upload(numbers, self._device)
        captured = self._graphs.get(layout)
        if captured is None:
            # Lazy initialisation (cuBLAS, the allocator) may not happen in a capture, and a capture computes nothing.
            logits = self._compute(layout, flat, spans)
            self._outputs.setdefault(layout.rows, torch.empty_like(logits))
            self._capture(layout, flat, spans)
            return logits
        self._graphs.move_to_end(layout)
        graph, inputs = captured
        inputs.copy_(flat, non_blocking=True)
        graph.replay()
        return self._outputs[layout.rows]

    def _capture(self, layout: Layout, inputs: Tensor, spans: Sequence[Span]) -> None:
        if len(self._graphs) >= self._most:
            torch.cuda.synchronize(self._device)  # it may still run
            self._graphs.popitem(last=False)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            # Other threads read rows on the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._outputs[layout.rows].copy_(self._compute(layout, inputs, spans))
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # torch leaves the thread on the capture's, where nothing waits for look-ups
            self._graphs.clear()
            raise CaptureFailed(f"capturing {layout}: {error}") from error
        self._graphs[layout] = graph, inputs
