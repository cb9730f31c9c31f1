"""Steps inside vLLM's worker. `vllm_runner.py` lists what both modules use of vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec
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

    @torch.inference_mode()
    def thinklogit_step(self, step: Step) -> Tensor | None:
        """Logits [R, V] float32 on the device; None without rows, and on ranks that get none."""
        runner = self.model_runner
        groups = runner.kv_cache_config.kv_cache_groups
        size, counts = groups[0].kv_cache_spec.block_size, np.diff(step.starts)
        owner, (column, offset) = np.repeat(np.arange(len(counts)), counts), np.divmod(step.positions, size)
        tables = [_block(step.blocks, number, len(groups)) for number in range(len(groups))]
        slots = [table[owner, column].astype(np.int64) * size + offset for table in tables]
        arrays = (step.ids, step.positions, step.starts, step.lengths, step.keep)
        ids, positions, starts, lengths, keep, *rest = upload_together([*arrays, *tables, *slots], runner.device)
        metadata: dict[str, Any] = {}
        mapping: dict[str, Tensor] = {}
        for group, attention, table, slot in zip(
            groups, runner.attn_groups, rest[: len(groups)], rest[len(groups) :], strict=True
        ):
            common = CommonAttentionMetadata(
                query_start_loc=starts,
                query_start_loc_cpu=torch.from_numpy(step.starts),
                seq_lens=lengths,
                seq_lens_cpu_upper_bound=torch.from_numpy(step.lengths),
                num_reqs=len(counts),
                num_actual_tokens=len(step.ids),
                max_query_len=int(counts.max()),
                max_seq_len=int(step.lengths.max()),
                block_table_tensor=table,
                slot_mapping=slot,
                positions=positions,
                is_prefilling=torch.from_numpy(counts > 1),
            )
            mapping.update(dict.fromkeys(group.layer_names, slot))
            for part in attention:
                metadata.update(dict.fromkeys(part.layer_names, part.build_metadata(common)))
        with set_forward_context(metadata, self.vllm_config, num_tokens=len(step.ids), slot_mapping=mapping):
            hidden = runner.model(input_ids=ids, positions=positions, intermediate_tensors=None, inputs_embeds=None)
        if not len(step.keep):  # the ranks cannot gather nothing
            return None
        logits = runner.model.compute_logits(hidden[keep])
        return None if logits is None else logits.float()


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
