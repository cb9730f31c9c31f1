"""Linear layers whose output rows have the same bits in any batch, for `batch_invariant` mode.

For another number of rows a matrix product may use another kernel with another order of summation, as MKL does on some
CPU types from 16 rows on. So rows are multiplied in tiles of eight: every product has the same shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TILE = 8  # rows; the engine pads tokens and logits to a multiple of it


class BatchInvariantLinear(nn.Module):
    """A linear layer with the same weight. Rows that are no multiple of a tile are multiplied in one product."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        rows = x.shape[:-1].numel()
        if not rows or rows % TILE:
            return F.linear(x, self.weight, self.bias)
        tiles = x.reshape(-1, TILE, x.shape[-1])
        out = torch.bmm(tiles, self.weight.t()[None].expand(len(tiles), -1, -1)).view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


def make_linears_batch_invariant(model: PreTrainedModel) -> None:
    """Replace every plain linear layer of a model. Parameters keep their names."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, BatchInvariantLinear(module))
