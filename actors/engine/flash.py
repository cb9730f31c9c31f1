"""FlashAttention-2 through torch's own operator, on the pools as they lie: nothing is gathered, no mask is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from actors.engine.attention import LayerCall, RaggedBatch
from actors.engine.backends import Gathered

_WIDEST_HEAD = 256  # and a multiple of 8


def flash_supported(device: torch.device, dtype: torch.dtype) -> bool:
    """True if the operator runs there: CUDA of compute capability 8.0 or later, 16 bits."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or not torch.cuda.is_available():
        return False
    built = torch.backends.cuda.is_flash_attention_available()
    return built and torch.cuda.get_device_capability(device) >= (8, 0)


class FlashAttention:
    """One call a layer for all sequences. Extent starts stand in the place of cumulative key counts.

    The operator reads sequence b's keys at rows [starts[b], starts[b] + lengths[b]) of the pool, because `seqused_k`
    takes precedence over differences of `cum_seq_k`. Layers that it cannot do (capped scores, sinks, odd head widths)
    attend gathered, and then `static` is False: their shapes depend on the step.
    op: the operator, `torch.ops.aten._flash_attention_forward` by default.
    """

    name = "flash"

    def __init__(self, op: Callable[..., Any] | None = None) -> None:
        self._op = op or torch.ops.aten._flash_attention_forward
        self._gathered = Gathered()
        self.static = True

    def attend(self, step: RaggedBatch, query: Tensor, keys: Tensor, values: Tensor, call: LayerCall) -> Tensor:
        if not _fits(query, values, call):
            self.static = False
            return self._gathered.attend(step, query, keys, values, call)
        varlen = step.varlen_on(query.device)
        if not len(varlen.lengths):
            return torch.zeros_like(query)
        output = self._op(
            query,
            keys,
            values,
            varlen.cu_q,
            varlen.starts,
            varlen.max_q,
            varlen.max_k,
            0.0,
            True,
            False,
            scale=call.scale,
            window_size_left=None if call.window is None else call.window - 1,
            window_size_right=None if call.window is None else 0,
            seqused_k=varlen.lengths,
        )[0]
        # Tokens of no sequence are not written by the operator; garbage must not reach the trash row.
        attended: Tensor = output.masked_fill(varlen.padding[:, None, None], 0.0)
        return attended


def _fits(query: Tensor, values: Tensor, call: LayerCall) -> bool:
    width = query.shape[-1]
    plain = call.softcap is None and call.sinks is None
    return plain and width == values.shape[-1] and width <= _WIDEST_HEAD and width % 8 == 0
