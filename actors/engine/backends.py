"""The attention back ends that use torch's SDPA and run on every device."""

from __future__ import annotations

from collections import defaultdict
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.engine.attention import LayerCall, RaggedBatch, Span


class PerSession:
    """Attends each span in a call of its own on views of its extent: the shapes equal those of a session alone."""

    name = "per_session"
    static = False

    def attend(self, step: RaggedBatch, query: Tensor, keys: Tensor, values: Tensor, call: LayerCall) -> Tensor:
        parts = []
        for span in step.spans:
            # The first new token attends farthest back; keys before its window are not read.
            seen = span.length if call.window is None else min(span.length, call.window + span.count - 1)
            low = span.start + span.length - seen
            part = _attend_together(
                query[None, span.first : span.first + span.count],
                keys[None, low : low + seen],
                values[None, low : low + seen],
                self._mask(step, span.count, seen, call.window, query.device),
                call,
            )
            parts.append(part[0])
        padding = step.tokens - sum(span.count for span in step.spans)
        return torch.cat([*parts, query.new_zeros(padding, query.shape[1], values.shape[-1])])

    @staticmethod
    def _mask(step: RaggedBatch, count: int, seen: int, window: int | None, device: torch.device) -> Tensor | None:
        """[1, count, seen], True where a token attends to a key; None for a single token, which attends to all."""
        if count == 1:
            return None
        return step.cached(
            ("mask", count, seen, window, device),
            lambda: _visible(torch.arange(seen - count, seen, device=device)[None], seen, window),
        )


class Gathered:
    """Attends all spans of equal count in one call; their keys are gathered to [B, L]."""

    name = "gathered"
    static = False

    def attend(self, step: RaggedBatch, query: Tensor, keys: Tensor, values: Tensor, call: LayerCall) -> Tensor:
        out = query.new_zeros(step.tokens, query.shape[1], values.shape[-1])
        for group in step.cached("groups", partial(self._groups, step)):
            count, device = group[0].count, query.device
            indices = partial(self._indices, group, device, keys.shape[0] - 1)
            rows, index, last = step.cached(("indices", count, device), indices)
            visible = partial(_visible, last, index.shape[1], call.window)
            mask = step.cached(("mask", count, call.window, device), visible)
            out[rows] = _attend_together(query[rows], keys[index], values[index], mask, call)
        return out

    @staticmethod
    def _groups(step: RaggedBatch) -> list[tuple[Span, ...]]:
        by_count: defaultdict[int, list[Span]] = defaultdict(list)
        for span in step.spans:
            by_count[span.count].append(span)
        return [tuple(group) for group in by_count.values()]

    @staticmethod
    def _indices(group: tuple[Span, ...], device: torch.device, trash: int) -> tuple[Tensor, Tensor, Tensor]:
        """Packed indices [B, n], pool rows [B, L], and the absolute position [B, n] of each new token."""
        spread = torch.arange(group[0].count, device=device)
        first = torch.tensor([span.first for span in group], device=device)[:, None]
        start = torch.tensor([span.start for span in group], device=device)[:, None]
        before = torch.tensor([span.length - span.count for span in group], device=device)[:, None]
        longest = torch.arange(max(span.length for span in group), device=device)
        return first + spread, (start + longest).clamp(max=trash), before + spread


def _visible(last: Tensor, keys: int, window: int | None) -> Tensor:
    """Mask [B, n, keys]: token i at position last[b, i] attends to positions <= its own within the window."""
    position = torch.arange(keys, device=last.device)
    mask = position <= last[..., None]
    return mask if window is None else mask & (position > last[..., None] - window)


def _attend_together(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, call: LayerCall) -> Tensor:
    """query [B, n, heads, d], keys and values [B, L, kv_heads, d], mask [B, n, L] -> [B, n, heads, d_v].

    The heads of a group are folded into the query axis, so that keys and values are not repeated.
    """
    batch, count, heads, width = query.shape
    kv_heads = keys.shape[2]
    group = heads // kv_heads
    folded = query.reshape(batch, count, kv_heads, group, width)
    if count > 1:
        folded = folded.permute(0, 2, 3, 1, 4)
    folded = folded.reshape(batch, kv_heads, group * count, width)
    k, v = keys.transpose(1, 2), values.transpose(1, 2)
    if mask is not None:
        mask = mask[:, None, None].expand(-1, 1, group, -1, -1).reshape(len(mask), 1, group * count, -1)
    if call.softcap is None and call.sinks is None:
        out = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=call.scale)
    else:
        sinks = None if call.sinks is None else call.sinks.view(1, kv_heads, group, 1).expand(-1, -1, -1, count)
        out = _capped(folded, k, v, mask, call, None if sinks is None else sinks.reshape(1, kv_heads, -1, 1))
    if count > 1:
        out = out.view(batch, kv_heads, group, count, -1).permute(0, 3, 1, 2, 4)
    return out.reshape(batch, count, heads, -1)


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: LayerCall, sinks: Tensor | None) -> Tensor:
    """Attention with capped scores (Gemma 2) or sinks (gpt-oss), which SDPA lacks. The softmax is float32."""
    scores = torch.matmul(q, k.transpose(2, 3)) * call.scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.expand(len(scores), -1, -1, -1).to(scores.dtype)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights[..., : k.shape[2]], v)
