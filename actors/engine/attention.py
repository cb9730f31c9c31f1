"""The attention function that transformers calls for every layer of a packed, ragged batch.

The new tokens of all sessions form one sequence of T tokens. The function writes their keys and values into the pool
and calls a back end, which attends each session to its own extent of the pool. `actors.engine.registry` chooses the
back end. The function's name is unknown to transformers' mask interface, so transformers builds no mask.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from actors.engine.kv_pool import KVPool

T = TypeVar("T")
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive new tokens of one session that attend together."""

    first: int  # index of the first of them in the packed batch
    count: int
    start: int  # pool row of the session's first token
    length: int  # tokens of the session in the pool, the new ones included


class Varlen(NamedTuple):
    """Spans in the form for kernels of variable length, all on one device. A padding sequence has length 0."""

    cu_q: Tensor  # [B + 1] int32, sequence b's new tokens are [cu_q[b], cu_q[b + 1])
    starts: Tensor  # [B + 1] int32, the pool row of each sequence's first token
    lengths: Tensor  # [B] int32, each sequence's tokens in the pool
    max_q: int
    max_k: int
    padding: Tensor  # [T] bool, tokens of no session

    def to(self, device: torch.device) -> Varlen:
        """The same on another device."""
        cu_q, starts, lengths = (part.to(device) for part in (self.cu_q, self.starts, self.lengths))
        return Varlen(cu_q, starts, lengths, self.max_q, self.max_k, self.padding.to(device))


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """The sequences of one forward, for attention."""

    spans: tuple[Span, ...]
    tokens: int  # T, padding included
    write: Tensor  # [T] pool rows of the new tokens
    read_varlen: Callable[[], Varlen]  # gives the spans on the device of `write`
    memo: dict[Hashable, Any] = field(default_factory=dict)  # of `cached`

    def cached(self, key: Hashable, compute: Callable[[], T]) -> T:
        """A value that is computed once in a step, for all layers."""
        if key not in self.memo:
            self.memo[key] = compute()
        value: T = self.memo[key]
        return value

    def write_on(self, device: torch.device) -> Tensor:
        """The pool rows on the device of a layer."""
        same = self.write.device == device
        return self.write if same else self.cached(("write", device), lambda: self.write.to(device))

    def varlen_on(self, device: torch.device) -> Varlen:
        """The spans on the device of a layer."""
        return self.cached(("varlen", device), lambda: self.read_varlen().to(device))


@dataclass(frozen=True, slots=True)
class LayerCall:
    """The parameters of a layer's attention besides its tensors."""

    scale: float
    window: int | None  # a token attends to itself and the window - 1 tokens before it
    softcap: float | None
    sinks: Tensor | None  # [heads] logits of an attention sink


class AttentionBackend(Protocol):
    """One implementation of attention. A configuration can force it by its `name`."""

    name: str
    static: bool  # True if a captured step can be replayed: no work on the host depends on the spans

    def attend(self, step: RaggedBatch, query: Tensor, keys: Tensor, values: Tensor, call: LayerCall) -> Tensor:
        """query [T, heads, d], key and value pools [rows, kv_heads, d] -> [T, heads, d_v]; 0 for padding tokens."""
        ...


class StepAttention:
    """One engine's attention function in transformers' registry. step: set while a forward runs."""

    def __init__(self, pool: KVPool, backend: AttentionBackend) -> None:
        self.pool, self.backend = pool, backend
        self.step: RaggedBatch | None = None
        self.like_sdpa = True  # False once a layer capped its scores or had sinks, which SDPA lacks
        # transformers interprets "flash", "paged|" and "/" in a name.
        self.name = f"step_engine_{next(_numbers)}"
        ALL_ATTENTION_FUNCTIONS[self.name] = self

    def unregister(self) -> None:
        """Remove the function from transformers' registry, so that the pool can be freed."""
        del ALL_ATTENTION_FUNCTIONS[self.name]

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """query [1, heads, T, d], key and value [1, kv_heads, T, d] -> [1, T, heads, d_v], transformers' interface."""
        assert self.step is not None, "attention outside of a step"
        packed_query, packed_key, packed_value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        layer = module.layer_idx
        assert isinstance(layer, int)
        keys, values = self.pool.write(layer, self.step.write_on(key.device), packed_key, packed_value)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        call = LayerCall(scale, sliding_window, softcap, s_aux)
        self.like_sdpa &= softcap is None and s_aux is None
        return self.backend.attend(self.step, packed_query, keys, values, call)[None], None
