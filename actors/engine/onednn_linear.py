"""Linear layers on the CPU whose weight is stored in oneDNN's blocked order.

A verification of drafts multiplies 4 to 8 rows. As a plain float32 product this costs 1.9 to 2.5 times a product of one
row, though it reads the same weight; in blocked order it costs 1.2 to 1.4 times (AVX-512, 1 and 2 threads). One row
alone costs up to a tenth more, unless the weight is as large as a head's.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from actors.engine.paging import page_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# For smaller weights the 15 microseconds of the call itself cost more than it saves.
SMALLEST = 1 << 20  # elements of a weight
_ROWS = 8  # oneDNN chooses the order for products of so many rows; it serves any number


class OneDnnLinear(nn.Module):
    """A float32 linear layer that equals the plain one except for rounding. Its weight replaces the plain one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        # Not a buffer: only this product can read the order.
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), _ROWS)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., in_features] -> [..., out_features]."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self.packed, self.bias, "none", [], "")
        return product


def use_onednn_linears(model: PreTrainedModel, smallest: int = SMALLEST) -> int:
    """Replace the large float32 linear layers of a model on the CPU; return their number, 0 if not supported.

    A weight that other layers use too (a head tied to the embeddings) stays for them beside its packed copy, but its
    pages are given back: of embeddings, few rows are read.
    """
    if not _supported():
        return 0
    packed = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if _packable(child, smallest):
                assert isinstance(child, nn.Linear)
                setattr(parent, name, OneDnnLinear(child))
                page_out(child.weight)
                packed += 1
    return packed


def _packable(module: nn.Module, smallest: int) -> bool:
    if type(module) is not nn.Linear or hasattr(module, "_hf_hook"):  # accelerate's hooks move plain weights
        return False
    weight = module.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= smallest


def _supported() -> bool:
    machine = platform.machine().lower()
    return torch._C._has_mkldnn and machine in ("x86_64", "amd64")
