"""Runs the forwards of a model of transformers: every step is one ragged forward over the new tokens of many sessions.

No model code is changed. transformers gets packed tokens [1, T] with their positions, calls the attention function
that is registered here, and returns the logits of the requested tokens only.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Collection, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from actors.engine.attention import AttentionBackend, RaggedBatch, Span, StepAttention
from actors.engine.batch_invariant import TILE, make_linears_batch_invariant
from actors.engine.devices import device_name
from actors.engine.digest import model_digest
from actors.engine.errors import LoadError
from actors.engine.graphs import CapturedRunner, GraphBuckets, PlainRunner
from actors.engine.heads import widen_head
from actors.engine.inputs import Batch, Layout, upload
from actors.engine.interface import Extend
from actors.engine.kv_pool import KVPool
from actors.engine.onednn_linear import OneDnnLinear, use_onednn_linears
from actors.engine.registry import choose_backend
from actors.engine.step_engine import StepEngine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


NativeEngine: TypeAlias = "StepEngine[NativeRunner]"


def native_engine(
    model: PreTrainedModel, cache_tokens: int, *, max_held_rows: int | None = None, **options: Any
) -> NativeEngine:
    """An engine that runs `model`. max_held_rows: see StepEngine; the other arguments: see NativeRunner."""
    return StepEngine(NativeRunner(model, cache_tokens, **options), max_held_rows)


class NativeRunner:
    """One causal language model of transformers, with its KV cache.

    cache_tokens: tokens of all sessions together.
    batch_invariant: use one thread, pad token and row counts to a multiple of 8 and attend every token by itself. Then
    prefill in chunks, verification with rejection, eviction and fork are bitwise equal to decoding a session alone,
    token by token, on one CPU type and torch build.
    backend: name of an attention back end; None for the choice of `actors.engine.registry`.
    graphs: pad small steps to buckets, captured as CUDA graphs if possible; None: only if they can be captured.
    Raises LoadError for a model, device or back end that does not support this.
    """

    positions: int | None = None  # RoPE is computed as far as it is needed

    def __init__(
        self,
        model: PreTrainedModel,
        cache_tokens: int,
        *,
        batch_invariant: bool = False,
        backend: str | None = None,
        graphs: bool | None = None,
    ) -> None:
        assert not (batch_invariant and graphs), "a bucket pads in another way than batch_invariant mode"
        _require_kept_logits(model)
        if batch_invariant:
            _require_float32_on_cpu(model)
            torch.set_num_threads(1)
        self.batch_invariant = batch_invariant
        self.digest = model_digest(model)
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])  # ids that the model has embeddings for
        widen_head(model)
        if batch_invariant:
            make_linears_batch_invariant(model)
        self.packed_linears = 0 if batch_invariant else use_onednn_linears(model)  # layers
        self._model = model.eval()
        self.cache = KVPool(cache_tokens)
        self._attention = StepAttention(self.cache, choose_backend(model.device, model.dtype, backend))
        weakref.finalize(self, self._attention.unregister)
        model.set_attn_implementation(self._attention.name)
        self._wants_graphs = graphs
        self.width = self._make_pools()
        self.layers = len(self.cache.layers)  # layers with attention
        self.hidden_layers = int(model.config.get_text_config().num_hidden_layers)
        self.heads = int(model.config.get_text_config().num_attention_heads)  # of queries
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.devices: Sequence[str] = (device_name(model.device),)

    def resize(self, cache_tokens: int) -> None:
        """Give the runner, which has no sessions, a cache of another size."""
        self.cache.resize(cache_tokens)
        self._make_pools()

    def _make_pools(self) -> int:
        """Make the cache's tensors, and the graphs that use them. Returns the number of logits in a row."""
        self.graphs: GraphBuckets | None = None
        width = int(self.run(Batch([0], [0], [self.cache.trash], [], [0])).shape[-1])
        self.graphs = self._graphs(self._wants_graphs)
        return width

    @property
    def attention(self) -> AttentionBackend:
        return self._attention.backend

    @property
    def cache_layers(self) -> Collection[tuple[Tensor, Tensor]]:
        """The pools of keys and values, each [rows, kv_heads, head_dim], of each layer."""
        return self.cache.layers.values()

    def plain_logits(self, tokens: Sequence[int]) -> list[Tensor]:
        """Logits [n, V] float32 of transformers' own forwards of one sequence, without the cache.

        In float32 with eager attention. In 16 bit first with SDPA, as here, if it can compute the model's attention.
        """
        rounded = self.dtype != torch.float32 and self._attention.like_sdpa
        names = ["sdpa", "eager"] if rounded and self._model._supports_sdpa else ["eager"]
        return [self._plain_logits(tokens, name) for name in names]

    def _plain_logits(self, tokens: Sequence[int], attention: str) -> Tensor:
        try:
            self._model.set_attn_implementation(attention)
            with torch.inference_mode():
                ids = torch.tensor([list(tokens)], device=self._model.device)
                logits: Tensor = self._model(input_ids=ids, use_cache=False).logits[0].float()
        finally:
            self._model.set_attn_implementation(self._attention.name)
        return logits

    def non_finite_weight(self) -> str | None:
        """Name of the first floating-point weight that holds NaN or infinite values; None if there is none."""
        packed = {
            f"{name}.weight": module.packed.to_dense()
            for name, module in self._model.named_modules()
            if isinstance(module, OneDnnLinear)
        }
        for name, weight in chain(self._model.named_parameters(), packed.items()):
            if weight.dtype in _FLOATS and not weight.is_meta and not bool(weight.isfinite().all()):
                return str(name)
        return None

    def forward(self, admitted: Sequence[Extend]) -> Tensor:
        """Pack the new tokens of all extends and run them. Returns the logits of their rows, then padding."""
        ids: list[int] = []
        positions: list[int] = []
        write: list[int] = []
        keep: list[int] = []
        spans: list[Span] = []
        for extend in admitted:
            start, count, first = self.cache.start(extend.session), len(extend.tokens), len(ids)
            ids += extend.tokens
            positions += range(extend.position, extend.end)
            write += range(start + extend.position, start + extend.end)
            keep += range(first + count - extend.rows, first + count)
            if self.batch_invariant:
                spans += [Span(first + i, 1, start, extend.position + i + 1) for i in range(count)]
            else:
                spans.append(Span(first, count, start, extend.end))
        return self.run(Batch(ids, positions, write, spans, keep))

    def run(self, batch: Batch) -> Tensor:
        """Logits [R, V] float32 of the tokens to keep; R and T are padded in batch_invariant mode."""
        if self.graphs is not None:
            logits = self.graphs.run(batch)
            if logits is not None:
                return logits
        tokens, rows = self.padded(len(batch.ids)), self.padded(len(batch.keep))
        layout = Layout(tokens, rows, len(batch.spans), batch.max_q, batch.max_k)
        return self._compute(layout, upload(layout.flatten(batch, self.cache.trash), self._model.device), batch.spans)

    @torch.inference_mode()
    def _compute(self, layout: Layout, flat: Tensor, spans: Sequence[Span]) -> Tensor:
        """Logits [rows, V] float32 of inputs on the device. A static back end does not use `spans`."""
        inputs = layout.read(flat)
        read_varlen = partial(layout.read_varlen, flat)
        self._attention.step = RaggedBatch(tuple(spans), layout.tokens, inputs.write, read_varlen)
        try:
            output = self._model(
                input_ids=inputs.ids[None],
                position_ids=inputs.positions[None],
                use_cache=False,
                logits_to_keep=inputs.keep,
            )
        finally:
            self._attention.step = None
        logits: Tensor = output.logits[0].float()
        return logits

    def _graphs(self, wanted: bool | None) -> GraphBuckets | None:
        """Graphs for a static back end on one GPU; elsewhere, if `wanted`, the same buckets as plain calls."""
        device, backend = self._model.device, self._attention.backend
        spread = {pools[0].device for pools in self.cache.layers.values()} != {device}
        capture = device.type == "cuda" and backend.static and not spread
        if not (capture if wanted is None else wanted):
            return None
        runner = CapturedRunner(self._compute, device) if capture else PlainRunner(self._compute, device)
        return GraphBuckets(runner, self.cache.trash)

    def padded(self, count: int) -> int:
        return -(-count // TILE) * TILE if self.batch_invariant else count


def _require_kept_logits(model: PreTrainedModel) -> None:
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        out = "Choose a causal language model of transformers 5.17 or later."
        raise LoadError(type(model).__name__, "its forward takes no logits_to_keep", out)


def _require_float32_on_cpu(model: PreTrainedModel) -> None:
    if model.device.type != "cpu" or model.dtype != torch.float32:
        why = f"the model is on {model.device} in {model.dtype}"
        raise LoadError("batch_invariant mode", why, "Set device: cpu and dtype: float32, or leave it unset.")
