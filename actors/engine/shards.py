"""One rank's share of a model: transformers' tensor-parallel plan, run on plain local tensors.

transformers shards the weights while it loads them and wraps each in a DTensor, which costs tens of microseconds of
Python at every linear layer. Here linear layers keep their local share alone, and the head gathers float32 rows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store
from torch.distributed.tensor import DTensor, Shard

from actors.engine.errors import LoadError
from actors.engine.heads import widen_head
from actors.engine.sizing import text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOOPBACK = "127.0.0.1"  # ranks share a node, and nothing of theirs listens elsewhere


def refuse_ranks(config: Mapping[str, Any], ranks: int, name: str) -> None:
    """Raise LoadError if the heads of a model with this config cannot be shared out evenly to so many ranks."""
    text = text_config(config)
    heads = int(text.get("num_attention_heads") or 0)
    counts = {"attention heads": heads, "key and value heads": int(text.get("num_key_value_heads") or heads)}
    for what, count in counts.items():
        if count % ranks:
            fitting = [n for n in range(1, ranks) if all(each % n == 0 for each in counts.values())]
            out = f"Set tensor_parallel: to {' or '.join(map(str, fitting))}."
            raise LoadError(name, f"its {count} {what} cannot be shared by {ranks} ranks", out)


def device_kind(device: str, name: str) -> str:
    """ "cuda" or "cpu", what the ranks compute on; LoadError where transformers would choose another one."""
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        why = "num_gpus above 0 or device: cuda asks for GPUs, but torch sees none"
        raise LoadError(name, why, "Set num_gpus: 0 for ranks on the CPU, or install torch for CUDA.")
    if device == "cpu" and cuda:
        raise LoadError(name, "its ranks would take the GPUs they see", "Set CUDA_VISIBLE_DEVICES= to hide them.")
    return "cuda" if cuda else "cpu"


def join_group(store: Store, rank: int, ranks: int, kind: str, timeout_s: float) -> None:
    """Join the process group of the ranks: nccl on GPUs, gloo on the CPU, both over loopback.

    A collective that waits longer than `timeout_s` raises (gloo), or ends the process (nccl's watchdog).
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    device = None
    if kind == "cuda":
        # Ray shows each rank its own GPU; plain processes see all of them.
        index = rank if torch.cuda.device_count() >= ranks else 0
        os.environ["LOCAL_RANK"] = str(index)  # where transformers puts the weights
        torch.cuda.set_device(index)
        device = torch.device("cuda", index)
    backend = "nccl" if kind == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout, device_id=device)


class GatheredHead(nn.Module):
    """A head whose vocabulary is spread over the ranks: float32 rows, whole on every rank."""

    def __init__(self, local: nn.Module, width: int, ranks: int) -> None:
        super().__init__()
        self.local, self.width, self.ranks = local, width, ranks
        self._share = -(-width // ranks)  # the last ranks may hold fewer

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., H], the same on all ranks -> logits [..., V]."""
        part = self.local(hidden)
        part = F.pad(part, (0, self._share - part.shape[-1])).contiguous()
        parts = part.new_empty(self.ranks, *part.shape)
        dist.all_gather(list(parts.unbind(0)), part)
        return parts.movedim(0, -2).reshape(*hidden.shape[:-1], -1)[..., : self.width]


def use_local_shares(model: PreTrainedModel) -> None:
    """Leave each linear layer its own share of the weights as plain tensors, and gather the rows of a shared head."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            for name, parameter in list(module.named_parameters(recurse=False)):
                if isinstance(parameter, DTensor):
                    module._parameters[name] = nn.Parameter(parameter.to_local(), requires_grad=False)
    if isinstance(head, nn.Linear) and isinstance(head.weight, DTensor):
        _gather_head(model, head, head.weight)


def _gather_head(model: PreTrainedModel, head: nn.Linear, weight: DTensor) -> None:
    if weight.placements != (Shard(0),):
        out = "Choose a model whose head transformers shares out by vocabulary."
        raise LoadError(type(model).__name__, f"its head is placed as {weight.placements}", out)
    share = weight.to_local()
    local = nn.Linear(share.shape[1], share.shape[0], bias=head.bias is not None, device="meta")
    local.weight = nn.Parameter(share, requires_grad=False)
    if head.bias is not None:
        bias = head.bias.to_local() if isinstance(head.bias, DTensor) else head.bias
        local.bias = nn.Parameter(bias, requires_grad=False)
    model.set_output_embeddings(local)
    widen_head(model)
    model.set_output_embeddings(GatheredHead(model.get_output_embeddings(), weight.shape[0], dist.get_world_size()))
