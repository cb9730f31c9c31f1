"""Steps inside vLLM's worker. `vllm_runner.py` lists what both modules use of vLLM.

A step is written into the tensors that vLLM's CUDA graphs read, so that a graph can be replayed in place of a forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBuffers
from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace

from actors.engine.devices import device_name
from actors.engine.errors import LoadError


class CacheShape(NamedTuple):
    """The cache and the rows of a worker. Block 0 is vLLM's own."""

    blocks: int  # of all groups together
    size: int  # tokens in a block
    groups: int  # of layers of one kind of attention: each has tables of its own over the same blocks
    width: int  # logits in a row
    device: str  # its name (actors.engine.devices)


class Step(NamedTuple):
    """One forward over many sessions, as plain numbers, so that it can be sent to a worker."""

    ids: NDArray[np.int32]  # [T]
    positions: NDArray[np.int64]  # [T]
    starts: NDArray[np.int32]  # [S + 1], where each session's tokens start
    lengths: NDArray[np.int32]  # [S], tokens of each session afterwards
    blocks: NDArray[np.int32]  # [S, W], its blocks, counted in blocks of all groups
    keep: NDArray[np.int64]  # [R], the tokens whose logits are wanted


class StepBuffers(NamedTuple):
    """Where a forward reads its inputs. T, S and W are the most tokens, sessions and blocks of a session in a step."""

    inputs: InputBuffers  # input_ids, positions, is_padding [T]; query_start_loc [S + 1]; seq_lens [S]
    tables: Sequence[Tensor]  # of each group [S, W] int32: vLLM's numbers of each session's blocks
    slots: Tensor  # [groups, T] int64: where in the cache each token is written
    size: int  # tokens in a block


class StepWorker:
    """Mixed into vLLM's worker, whose own names it must not have."""

    model_runner: Any
    vllm_config: Any

    def thinklogit_shape(self) -> CacheShape:
        """The shape of the cache. Raises LoadError for caches that cannot be cut off at any token."""
        runner, name = self.model_runner, self.vllm_config.model_config.model
        groups = runner.kv_cache_config.kv_cache_groups
        specs = [group.kv_cache_spec for group in groups]
        out = "Set engine: native, or choose another model."
        if not all(isinstance(spec, AttentionSpec) for spec in specs):
            raise LoadError(name, "it has recurrent layers, whose state cannot go back to an earlier token", out)
        if len({spec.block_size for spec in specs}) != 1:
            raise LoadError(name, "its layers have caches with blocks of different sizes", out)
        if getattr(runner.kv_cache_config, "needs_kv_cache_zeroing", False):
            raise LoadError(name, "its cache has to be zeroed before use", out)
        width = self.vllm_config.model_config.get_vocab_size()
        blocks, device = runner.kv_cache_config.num_blocks, device_name(runner.device)
        return CacheShape(blocks, specs[0].block_size, len(groups), width, device)

    @torch.inference_mode()
    def thinklogit_copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, (source, target), all at once."""
        runner = self.model_runner
        groups = len(runner.kv_cache_config.kv_cache_groups)
        blocks = [(_block(a, g, groups), _block(b, g, groups)) for a, b in pairs for g in range(groups)]
        copy_kv_cache_blocks_inplace(runner.kv_caches, runner.kv_cache_config.num_blocks, blocks)

    @cached_property
    def thinklogit_buffers(self) -> StepBuffers:
        """Those of vLLM's Model Runner V2, which its graphs read. V1, on CPUs, has none: they are made here."""
        runner, limits = self.model_runner, self.vllm_config.scheduler_config
        groups = runner.kv_cache_config.kv_cache_groups
        size = groups[0].kv_cache_spec.block_size
        if hasattr(runner, "input_buffers"):
            tables = runner.block_tables
            return StepBuffers(runner.input_buffers, tables.input_block_tables, tables.slot_mappings, size)
        sessions, tokens = limits.max_num_seqs, limits.max_num_batched_tokens
        width = -(-self.vllm_config.model_config.max_model_len // size)
        return StepBuffers(
            InputBuffers(sessions, tokens, runner.device),
            torch.zeros(len(groups), sessions, width, dtype=torch.int32, device=runner.device).unbind(),
            torch.zeros(len(groups), tokens, dtype=torch.int64, device=runner.device),
            size,
        )

    @torch.inference_mode()
    def thinklogit_step(self, step: Step, graphs: bool) -> Tensor | None:
        """Logits [R, V] float32 on the device; None without rows, and on ranks that get none.

        graphs: a CUDA graph is replayed, if vLLM has one.
        """
        runner = self.model_runner
        manager: ModelCudaGraphManager | None = getattr(runner, "cudagraph_manager", None) if graphs else None
        batch = dispatched(manager, np.diff(step.starts))
        keep = fill(self.thinklogit_buffers, step, batch.num_reqs or len(step.lengths))
        metadata = self.thinklogit_metadata(step, batch)
        if batch.cg_mode == CUDAGraphMode.FULL:
            assert manager is not None
            hidden = manager.run_fullgraph(batch)
        else:
            hidden = self.thinklogit_forward(batch, metadata)
        if not len(step.keep):  # the ranks cannot gather nothing
            return None
        logits = runner.model.compute_logits(hidden[keep])
        return None if logits is None else logits.float()

    def thinklogit_metadata(self, step: Step, batch: BatchExecutionDescriptor) -> dict[str, Any]:
        """What the attention of each layer, by its name, reads of the step in the buffers.

        A full graph computes the padding, too. Attention outside of a graph must not see it.
        """
        runner, buffers, full = self.model_runner, self.thinklogit_buffers, batch.cg_mode == CUDAGraphMode.FULL
        counts, tokens = np.diff(step.starts), len(step.ids)
        sessions = batch.num_reqs if full else len(counts)
        metadata: dict[str, Any] = build_attn_metadata(
            attn_groups=runner.attn_groups,
            kv_cache_config=runner.kv_cache_config,
            num_reqs=sessions,
            num_tokens=batch.num_tokens if full else tokens,
            query_start_loc_gpu=buffers.inputs.query_start_loc[: sessions + 1],
            query_start_loc_cpu=_padded(step.starts, sessions + 1, tokens),
            max_query_len=int(counts.max()),
            seq_lens=buffers.inputs.seq_lens[:sessions],
            seq_lens_cpu_upper_bound=_padded(step.lengths, sessions, 0),
            max_seq_len=int(step.lengths.max()),
            block_tables=[table[:sessions] for table in buffers.tables],
            slot_mappings=buffers.slots[:, : batch.num_tokens],
            positions=buffers.inputs.positions[: batch.num_tokens],
            is_prefilling=_padded(counts > 1, sessions, False),
        )
        return metadata

    def thinklogit_forward(self, batch: BatchExecutionDescriptor, metadata: dict[str, Any]) -> Tensor:
        """Hidden states [batch.num_tokens, H] of the step in the buffers, by the model or its piecewise graphs."""
        runner, tokens = self.model_runner, batch.num_tokens
        inputs, slots = self.thinklogit_buffers.inputs, self.thinklogit_buffers.slots[:, :tokens]
        arguments = {
            "input_ids": inputs.input_ids[:tokens],
            "positions": inputs.positions[:tokens],
            "intermediate_tensors": None,
            "inputs_embeds": None,
        }
        with set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=tokens,
            cudagraph_runtime_mode=batch.cg_mode,
            batch_descriptor=BatchDescriptor(num_tokens=tokens),
            slot_mapping=build_slot_mappings_by_layer(slots, runner.kv_cache_config),
            is_padding=inputs.is_padding[:tokens],
        ):
            if batch.cg_mode == CUDAGraphMode.PIECEWISE:
                hidden: Tensor = runner.cudagraph_manager.run_pw_graph(runner.model, arguments)
            else:
                hidden = runner.model(**arguments)
        return hidden


def dispatched(manager: ModelCudaGraphManager | None, counts: NDArray[np.int32]) -> BatchExecutionDescriptor:
    """The graph that vLLM has for sessions with these numbers of new tokens [S], and its padded size; or no graph."""
    sessions, tokens, longest = len(counts), int(counts.sum()), int(counts.max())
    if manager is None:
        return BatchExecutionDescriptor(CUDAGraphMode.NONE, tokens, sessions)
    uniform = longest if tokens == longest * sessions else None
    return manager.dispatch(sessions, tokens, uniform, 0, max_query_len=longest)


def fill(buffers: StepBuffers, step: Step, sessions: int) -> Tensor:
    """Write a step and its padding into the buffers, through one upload. Returns step.keep on the device.

    sessions: of the step and of its padding. As in vLLM, padded sessions have no tokens and the null block; padded
    tokens have no slot in the cache, and the ids and positions that an earlier step left there.
    """
    counts, groups = np.diff(step.starts), len(buffers.tables)
    count, tokens, width = len(counts), len(step.ids), step.blocks.shape[1]
    owner, (column, offset) = np.repeat(np.arange(count), counts), np.divmod(step.positions, buffers.size)
    blocks = np.stack([_block(step.blocks, group, groups) for group in range(groups)])
    written = blocks[:, owner, column].astype(np.int64) * buffers.size + offset
    arrays = (step.ids, step.positions, step.starts, step.lengths, blocks, written, step.keep)
    ids, positions, starts, lengths, tables, slots, keep = upload_together(arrays, buffers.slots.device)
    inputs = buffers.inputs
    _put(inputs.input_ids, ids)
    _put(inputs.positions, positions)
    _put(inputs.query_start_loc, starts, tokens)
    _put(inputs.seq_lens, lengths, 0)
    _put(buffers.slots, slots, PAD_SLOT_ID)
    inputs.is_padding[:tokens].fill_(False)
    inputs.is_padding[tokens:].fill_(True)
    for buffer, table in zip(buffers.tables, tables, strict=True):
        buffer[:count, :width].copy_(table)
        buffer[count:sessions].zero_()
    return keep


def _put(buffer: Tensor, values: Tensor, filler: int | None = None) -> None:
    """Write values at the front of a buffer's last dimension, and the filler behind them."""
    count = values.shape[-1]
    buffer[..., :count].copy_(values)
    if filler is not None:
        buffer[..., count:].fill_(filler)


def _padded(array: NDArray[Any], size: int, filler: Any) -> Tensor:
    """The array on the host, with the filler up to `size`."""
    return torch.from_numpy(np.concatenate([array, np.full(size - len(array), filler, array.dtype)]))


def upload_together(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """The arrays as tensors on a device, through one copy from pinned memory."""
    offsets = np.cumsum([0, *(-(-array.nbytes // 8) * 8 for array in arrays)]).tolist()
    host = torch.empty(offsets[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    view = host.numpy()
    for array, at in zip(arrays, offsets, strict=False):
        view[at : at + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    flat = host.to(device, non_blocking=True)
    kinds = [torch.from_numpy(np.empty(0, array.dtype)).dtype for array in arrays]
    return [
        flat[at : at + array.nbytes].view(kind).view(array.shape)
        for array, at, kind in zip(arrays, offsets, kinds, strict=False)
    ]


def _block(block: Any, group: int, groups: int) -> Any:
    """vLLM's number of a block in one group, where 0 is never used."""
    return block * groups + group + 1
