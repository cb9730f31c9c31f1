"""The computation of `aten::_flash_attention_forward` with `seqused_k`, in plain torch on any device and dtype."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def emulated_flash(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    causal: bool,
    debug: bool,
    *,
    scale: float,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor,
) -> tuple[Tensor, Any, Any, Any, Any]:
    """query [T, heads, d], pools [rows, kv_heads, d]; tokens of no sequence stay NaN, a query without keys gets 0.

    Refuses what the operator refuses or reads past: dtypes and lengths of the metadata, max_q and max_k too small.
    """
    batch = len(cu_q) - 1
    assert (dropout, causal, debug) == (0.0, True, False)
    assert cu_q.dtype == cu_k.dtype == seqused_k.dtype == torch.int32
    assert (len(cu_k), len(seqused_k)) == (batch + 1, batch)
    assert query.shape[-1] == keys.shape[-1] == values.shape[-1]
    assert window_size_right in (None, 0)
    group = query.shape[1] // keys.shape[1]
    out = torch.full_like(query, math.nan)
    if max_q == 1:  # the kernel then takes token b as that of sequence b and ignores cu_q
        assert len(query) == batch
        assert cu_q.tolist() == list(range(batch + 1))
    for b in range(batch):
        first, end, start, length = (int(part) for part in (cu_q[b], cu_q[b + 1], cu_k[b], seqused_k[b]))
        count = end - first
        assert 0 <= count <= max_q
        assert 0 <= length <= max_k
        position = torch.arange(length - count, length)[:, None]
        key = torch.arange(length)[None]
        seen = key <= position
        if window_size_left is not None:
            seen &= key >= position - window_size_left
        q = query[first:end].transpose(0, 1).double()
        k, v = (
            pool[start : start + length].transpose(0, 1).repeat_interleave(group, 0).double() for pool in (keys, values)
        )
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -math.inf)
        weights = torch.softmax(scores, -1).nan_to_num(0.0)
        out[first:end] = (weights @ v).transpose(0, 1).to(query.dtype)
    return out, None, None, None, None
