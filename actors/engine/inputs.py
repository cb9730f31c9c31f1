"""Packs the inputs of one forward into one flat tensor of integers, so that one copy brings them to the device.

A layout may be larger than its batch: tokens, rows and sequences are padded to a fixed shape, so that a captured graph
of that shape can run any batch that fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.engine.attention import Span, Varlen


@dataclass(frozen=True, slots=True)
class Batch:
    """The packed new tokens of a step's sessions, on the host."""

    ids: Sequence[int]  # [T]
    positions: Sequence[int]  # [T]
    write: Sequence[int]  # [T] pool rows
    spans: Sequence[Span]
    keep: Sequence[int]  # [R] indices of the packed tokens whose logits are requested

    @property
    def max_q(self) -> int:
        return max((span.count for span in self.spans), default=1)

    @property
    def max_k(self) -> int:
        return max((span.length for span in self.spans), default=1)


class Layout(NamedTuple):
    """The shape of a forward's inputs. max_q, max_k: limits of the new and the held tokens of a sequence."""

    tokens: int
    rows: int
    sequences: int
    max_q: int
    max_k: int

    @property
    def size(self) -> int:
        """Integers in the flat tensor."""
        return 3 * self.tokens + self.rows + 3 * self.sequences + 3

    def flatten(self, batch: Batch, trash: int) -> list[int]:
        """The batch in this layout: ids, positions, write, keep, cu_q, starts, lengths, number of real tokens.

        Padding tokens are written to the pool row `trash`. Padding sequences hold no tokens; each takes up to `max_q`
        padding tokens, so that with max_q 1 every sequence has one token, as decoding kernels require.
        """
        spans, real = batch.spans, len(batch.ids)
        padding, idle = self.tokens - real, self.sequences - len(spans)
        assert min(padding, idle, self.rows - len(batch.keep)) >= 0, f"{self} is too small"
        assert batch.max_q <= self.max_q, f"{self} is too small"
        ends = [0]
        for span in spans:
            ends.append(span.first + span.count)
        for _ in range(idle):
            ends.append(min(ends[-1] + self.max_q, self.tokens))
        flat = [*batch.ids, *[0] * padding, *batch.positions, *[0] * padding, *batch.write, *[trash] * padding]
        flat += [*batch.keep, *[0] * (self.rows - len(batch.keep)), *ends]
        flat += [*(span.start for span in spans), *[0] * (idle + 1)]  # the kernel requires the length of cu_q
        flat += [*(span.length for span in spans), *[0] * idle, real]
        return flat

    def read(self, flat: Tensor) -> Inputs:
        """The parts of a flat int64 tensor [size] that a model's forward takes, as views."""
        return Inputs(*torch.split(flat[: 3 * self.tokens + self.rows], [*[self.tokens] * 3, self.rows]))

    def read_varlen(self, flat: Tensor) -> Varlen:
        """The parts for kernels of variable length, without waiting for the device."""
        rest = flat[3 * self.tokens + self.rows :]
        cu_q, starts, lengths, real = torch.split(rest, [self.sequences + 1, self.sequences + 1, self.sequences, 1])
        padding = torch.arange(self.tokens, device=flat.device) >= real
        cu_q, starts, lengths = (part.to(torch.int32) for part in (cu_q, starts, lengths))
        return Varlen(cu_q, starts, lengths, self.max_q, self.max_k, padding)


class Inputs(NamedTuple):
    """The inputs of a model's forward, on its device."""

    ids: Tensor  # [T]
    positions: Tensor  # [T]
    write: Tensor  # [T]
    keep: Tensor  # [rows]


def upload(numbers: Sequence[float] | NDArray[Any], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """The numbers as a tensor on the device; to a GPU through pinned memory, without waiting."""
    host = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
