"""A model's head that yields float32 logits from 16-bit weights, not rounded 16-bit ones.

Rounded rows have ties at the top and lose the small differences between models that guidance adds up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Float32Head(nn.Module):
    """A linear head over the same weight, with a float32 product and sum.

    On CUDA `mm` takes 16-bit factors and yields float32. Elsewhere the weight is kept a second time in float32:
    memory (hidden x vocabulary x 4 bytes) for not converting it at every step.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias
        self._wide: Tensor | None = None if head.weight.is_cuda else head.weight.detach().float()

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., H] -> float32 logits [..., V]."""
        if self._wide is not None:
            logits = F.linear(hidden.float(), self._wide)
        else:
            flat = hidden.reshape(-1, hidden.shape[-1])
            logits = torch.mm(flat, self.weight.t(), out_dtype=torch.float32).view(*hidden.shape[:-1], -1)
        return logits if self.bias is None else logits + self.bias.float()


def widen_head(model: PreTrainedModel) -> None:
    """Replace a plain 16-bit linear head of a transformers model; others (float32, quantised) stay as they are.

    A quantised or otherwise special head computes in its own way; its output is converted to float32 afterwards.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.dtype not in (torch.bfloat16, torch.float16):
        return
    if head.weight.is_meta:  # offloaded: the weight comes and goes with accelerate's hook
        return
    hook = getattr(head, "_hf_hook", None)
    wide: nn.Module = Float32Head(head if hook is None else remove_hook_from_module(head))
    if hook is not None:
        wide = add_hook_to_module(wide, hook)
    model.set_output_embeddings(wide)
