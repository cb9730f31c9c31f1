"""The engine of one model: every step is one ragged forward over the new tokens of many sessions.

No model code is changed. transformers gets packed tokens [1, T] with their positions, calls the attention function
that is registered here, and returns the logits of the requested tokens only.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor

from actors.engine.attention import AttentionBackend, RaggedBatch, Span, StepAttention
from actors.engine.batch_invariant import TILE, make_linears_batch_invariant
from actors.engine.devices import device_name
from actors.engine.digest import model_digest
from actors.engine.errors import BadExtend, LoadError, RowGone, StepFailed
from actors.engine.graphs import CapturedRunner, GraphBuckets, PlainRunner
from actors.engine.heads import widen_head
from actors.engine.inputs import Batch, Layout, upload
from actors.engine.interface import CacheStats, Extend, Full, Held, KVMiss, Outcome, TopKSlices
from actors.engine.kv_pool import KVPool
from actors.engine.onednn_linear import OneDnnLinear, use_onednn_linears
from actors.engine.registry import choose_backend
from actors.engine.rows import (
    DeviceRows,
    LogitsRowStore,
    RowLocation,
    gather_rows,
    reduce_rows,
    row_budget,
    values_at,
)
from actors.engine.sessions import SessionTable, seniority

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class StepEngine:
    """Extends sessions of one causal language model. One thread calls it; `rows` may be called from any thread.

    cache_tokens: tokens of all sessions together.
    max_held_rows: logits rows in memory for lookups, width x 4 bytes each; None for those of 450 sessions with drafts,
    or fewer to fit a share of the memory.
    batch_invariant: use one thread, pad token and row counts to a multiple of 8 and attend every token by itself. Then
    prefill in chunks, verification with rejection, eviction and fork are bitwise equal to decoding a session alone,
    token by token, on one CPU type and torch build.
    backend: name of an attention back end; None for the choice of `actors.engine.registry`.
    graphs: pad small steps to buckets, captured as CUDA graphs if possible; None: only if they can be captured.
    digest: of the whole model, if `model` is one rank's share.
    Raises LoadError for a model, device or back end that does not support this.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache_tokens: int,
        *,
        batch_invariant: bool = False,
        backend: str | None = None,
        max_held_rows: int | None = None,
        graphs: bool | None = None,
        digest: int | None = None,
    ) -> None:
        assert not (batch_invariant and graphs), "a bucket pads in another way than batch_invariant mode"
        _require_kept_logits(model)
        if batch_invariant:
            _require_float32_on_cpu(model)
            torch.set_num_threads(1)
        self.batch_invariant = batch_invariant
        self.hash_seed = model_digest(model) if digest is None else digest
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])  # ids that the model has embeddings for
        widen_head(model)
        if batch_invariant:
            make_linears_batch_invariant(model)
        self.packed_linears = (
            0 if batch_invariant else use_onednn_linears(model)
        )  # whose weight is in an order of its own
        self._model = model.eval()
        self._pool = KVPool(cache_tokens)
        self._table = SessionTable(self._pool, self.hash_seed)
        self._attention = StepAttention(self._pool, choose_backend(model.device, model.dtype, backend))
        weakref.finalize(self, self._attention.unregister)
        model.set_attn_implementation(self._attention.name)
        self.graphs: GraphBuckets | None = None
        self.width = int(self._forward(Batch([0], [0], [self._pool.trash], [], [0])).shape[-1])  # also makes the pools
        self._store = LogitsRowStore(max_held_rows or row_budget(self.width, model.device))
        self.graphs = self._graphs(graphs)  # a capture needs the pools
        self.layers = len(self._pool.layers)  # layers with attention
        self.hidden_layers = int(model.config.get_text_config().num_hidden_layers)
        self.heads = int(model.config.get_text_config().num_attention_heads)  # of queries
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.devices: Sequence[str] = (device_name(model.device),)

    def extend(self, batch: Sequence[Extend]) -> list[Outcome]:
        """Run one forward for all extends that can run now, at most one of each session; return outcomes in order.

        Raises BadExtend, without any change, for an extend that can never succeed. Raises StepFailed if the forward
        raises: then every session of this step is dropped and gets `KVMiss(0)` next. Example, session 1 holding 10
        tokens, session 2 none, with a cache of 64 tokens (units of 32):

            Extend(1, position=8, tokens=(a, b, c), rows=3)   -> Held(1, length=11, rows=3)  rows 8, 9, 10
            Extend(2, position=0, tokens=(d,) * 20, rows=1)   -> Held(2, length=20, rows=1)  row 19
            Extend(3, position=5, tokens=(e,), rows=1)        -> KVMiss(3, held=0)           send from position 0

        The first two run as 23 packed tokens. Tokens 8 and 9 of session 1, rejected drafts, are overwritten.
        """
        self.check_batch(batch)
        answers = self._table.admit(self._within_row_budget(batch))
        outcomes = [self._outcome(extend, answers) for extend in batch]
        admitted = [extend for extend, outcome in zip(batch, outcomes, strict=True) if isinstance(outcome, Held)]
        if admitted:
            self._run(admitted)
        return outcomes

    def check_batch(self, batch: Sequence[Extend]) -> None:
        """Raise BadExtend if an extend of the batch can never succeed, or if two extend the same session."""
        if len({extend.session for extend in batch}) < len(batch):
            raise BadExtend(batch[0].session, "a session may be extended once in a step")
        for extend in batch:
            self.check_extend(extend)

    def check_extend(self, extend: Extend) -> None:
        """Raise BadExtend for an extend that can never succeed, so that it is refused before it joins a batch."""
        if not extend.tokens:
            raise BadExtend(extend.session, "an extend needs at least one token")
        if not 0 <= extend.rows <= len(extend.tokens):
            raise BadExtend(extend.session, f"{extend.rows} rows of {len(extend.tokens)} tokens")
        if extend.position < 0:
            raise BadExtend(extend.session, f"position {extend.position} is negative")
        if min(extend.tokens) < 0 or max(extend.tokens) >= self.vocabulary:
            raise BadExtend(extend.session, f"token ids must lie in [0, {self.vocabulary})")
        total = self._pool.extents.total
        if extend.end > total:
            raise BadExtend(extend.session, f"{extend.end} tokens do not fit a cache of {total}")
        if self._padded(extend.rows) > self._store.budget:
            raise BadExtend(extend.session, f"{extend.rows} rows, at most {self._store.budget} are held")

    @property
    def attention(self) -> AttentionBackend:
        return self._attention.backend

    @property
    def cache_layers(self) -> Collection[tuple[Tensor, Tensor]]:
        """The pools of keys and values, each [rows, kv_heads, head_dim], of each layer."""
        return self._pool.layers.values()

    def rows(self, session: int) -> DeviceRows | None:
        """The rows of the session's last extend and those that it kept, or None. Callable from any thread."""
        return self._store.get(session)

    def values(
        self, rows: Sequence[tuple[DeviceRows, int]], counts: Sequence[int], ids: NDArray[Any]
    ) -> NDArray[np.float32]:
        return values_at([held.places[row] for held, row in rows], counts, ids)

    def reduce(self, sessions: Sequence[int], k: int, temperatures: Sequence[float] | None = None) -> TopKSlices:
        """The slices of the rows of the last extends of `sessions`, in order. Raises RowGone if one has none."""
        return reduce_rows(self._fresh_rows(sessions), k, self.batch_invariant, temperatures)

    def whole(self, sessions: Sequence[int]) -> NDArray[np.float32]:
        """The full rows [R, V] of the last extends of `sessions`, in order. Raises RowGone if one has none."""
        array: NDArray[np.float32] = self._fresh_rows(sessions).cpu().numpy()
        return array

    @property
    def like_sdpa(self) -> bool:
        """True if SDPA can compute the attention of every layer: no capped scores, no sinks."""
        return self._attention.like_sdpa

    def plain_logits(self, tokens: Sequence[int], attention: str = "eager") -> Tensor:
        """Logits [n, V] float32 of transformers' own forward of one sequence, without the engine's cache.

        attention: a name of transformers' for the implementation.
        """
        self._model.set_attn_implementation(attention)
        try:
            with torch.inference_mode():
                ids = torch.tensor([list(tokens)], device=self._model.device)
                logits: Tensor = self._model(input_ids=ids, use_cache=False).logits[0].float()
        finally:
            self._model.set_attn_implementation(self._attention.name)
        return logits

    def non_finite_weight(self) -> str | None:
        """Name of the first floating-point weight that holds NaN or infinite values; None if there is none.

        Of a tensor-parallel model, among the weights of this rank.
        """
        packed = {
            f"{name}.weight": module.packed.to_dense()
            for name, module in self._model.named_modules()
            if isinstance(module, OneDnnLinear)
        }
        for name, whole in chain(self._model.named_parameters(), packed.items()):
            weight = whole.to_local() if isinstance(whole, DTensor) else whole
            if weight.dtype in _FLOATS and not weight.is_meta and not bool(weight.isfinite().all()):
                return str(name)
        return None

    def close(self, session: int) -> None:
        """Drop a session's cache and its rows."""
        self._table.evict(session)
        self._store.drop(session)

    def evict(self, session: int) -> None:
        """Drop a session's cache: its next extend gets `KVMiss(0)`. Its held rows stay readable."""
        self._table.evict(session)

    def shared(self, blocks: Sequence[int]) -> int:
        return self._table.shared(blocks)

    def fork(self, session: int, tokens: Sequence[int], blocks: Sequence[int], age: int) -> bool:
        return self._table.fork(session, tokens, blocks, age)

    def cache_stats(self) -> CacheStats:
        return CacheStats(self._pool.extents.total, self._pool.used, len(self._table.sessions))

    def check_health(self) -> None:
        """Raise if the engine cannot continue. An engine in one process always can."""

    def check(self) -> None:
        """Prove that free + used = all and that every extent, hash and row is consistent; AssertionError if not."""
        self._table.check()
        self._store.check()

    @staticmethod
    def _outcome(extend: Extend, answers: Mapping[int, KVMiss | Full | None]) -> Outcome:
        refusal = answers.get(extend.session, Full(extend.session))  # absent: over the row budget
        return Held(extend.session, extend.end, extend.rows) if refusal is None else refusal

    def _within_row_budget(self, batch: Sequence[Extend]) -> list[Extend]:
        """The oldest extends whose rows fit the row budget together. One alone always fits."""
        fitting, rows = [], 0
        for extend in sorted(batch, key=seniority):
            if self._padded(rows + extend.rows) <= self._store.budget:
                fitting.append(extend)
                rows += extend.rows
        return fitting

    def _run(self, admitted: Sequence[Extend]) -> None:
        sessions = [extend.session for extend in admitted]
        for extend in admitted:
            if not extend.keep:
                self._store.drop(extend.session)
        self._store.make_room(self._padded(sum(extend.rows for extend in admitted)))
        try:
            logits = self._forward_extends(admitted)
        except BaseException as error:
            # Their cache may be half written.
            for session in sessions:
                self.close(session)
            if isinstance(error, Exception):
                raise StepFailed(sessions, error) from error
            raise
        for extend in admitted:
            self._table.commit(extend)
        self._hold(admitted, logits)

    def _forward_extends(self, admitted: Sequence[Extend]) -> Tensor:
        """Pack the new tokens of all extends and run them. Returns the logits of their rows, then padding."""
        ids: list[int] = []
        positions: list[int] = []
        write: list[int] = []
        keep: list[int] = []
        spans: list[Span] = []
        for extend in admitted:
            start, count, first = self._pool.start(extend.session), len(extend.tokens), len(ids)
            ids += extend.tokens
            positions += range(extend.position, extend.end)
            write += range(start + extend.position, start + extend.end)
            keep += range(first + count - extend.rows, first + count)
            if self.batch_invariant:
                spans += [Span(first + i, 1, start, extend.position + i + 1) for i in range(count)]
            else:
                spans.append(Span(first, count, start, extend.end))
        return self._forward(Batch(ids, positions, write, spans, keep))

    def _forward(self, batch: Batch) -> Tensor:
        """Logits [R, V] float32 of the tokens to keep; R and T are padded in batch_invariant mode."""
        if self.graphs is not None:
            logits = self.graphs.run(batch)
            if logits is not None:
                return logits
        tokens, rows = self._padded(len(batch.ids)), self._padded(len(batch.keep))
        layout = Layout(tokens, rows, len(batch.spans), batch.max_q, batch.max_k)
        return self._compute(layout, upload(layout.flatten(batch, self._pool.trash), self._model.device), batch.spans)

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
        spread = {pools[0].device for pools in self._pool.layers.values()} != {device}
        capture = device.type == "cuda" and backend.static and not spread
        if not (capture if wanted is None else wanted):
            return None
        runner = CapturedRunner(self._compute, device) if capture else PlainRunner(self._compute, device)
        return GraphBuckets(runner, self._pool.trash)

    def _hold(self, admitted: Sequence[Extend], logits: Tensor) -> None:
        held, first = {}, 0
        for extend in admitted:
            if extend.rows:
                hashes = tuple(self._table.sessions[extend.session].hashes[-extend.rows :])
                places = tuple(RowLocation(logits, row) for row in range(first, first + extend.rows))
                held[extend.session] = DeviceRows(
                    extend.end - extend.rows, hashes, places, self.batch_invariant, extend.rows
                )
                first += extend.rows
        kept = {extend.session: (extend.position, extend.keep) for extend in admitted if extend.keep}
        self._store.hold(held, len(logits), kept)

    def _fresh_rows(self, sessions: Sequence[int]) -> Tensor:
        places: list[RowLocation] = []
        for session in sessions:
            held = self._store.get(session)
            if held is None:
                raise RowGone(session)
            places += held.places[-held.fresh :]
        return gather_rows(places) if places else torch.zeros(0, self.width)

    def _padded(self, count: int) -> int:
        return -(-count // TILE) * TILE if self.batch_invariant else count


def _require_kept_logits(model: PreTrainedModel) -> None:
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        out = "Choose a causal language model of transformers 5.17 or later."
        raise LoadError(type(model).__name__, "its forward takes no logits_to_keep", out)


def _require_float32_on_cpu(model: PreTrainedModel) -> None:
    if model.device.type != "cpu" or model.dtype != torch.float32:
        why = f"the model is on {model.device} in {model.dtype}"
        raise LoadError("batch_invariant mode", why, "Set device: cpu and dtype: float32, or leave it unset.")
