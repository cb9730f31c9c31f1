"""Makes a model's head yield float32 logits from 16-bit weights instead of 16-bit logits.

Rounded logits have ties at the top and lose the small differences between models that guidance adds up.
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
    """A linear head with the same weight, whose product and sum are float32.

    On CUDA `mm` takes 16-bit factors and yields float32. Elsewhere a float32 copy of the weight (hidden x vocabulary x
    4 bytes) saves its conversion at every step.
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
    """Replace the head of a transformers model if it is a plain 16-bit linear layer.

    Other heads (float32, quantised) stay. Their output is converted to float32 later.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.dtype not in (torch.bfloat16, torch.float16):
        return
    if head.weight.is_meta:  # offloaded: accelerate's hook loads the weight for each call
        return
    hook = getattr(head, "_hf_hook", None)
    wide: nn.Module = Float32Head(head if hook is None else remove_hook_from_module(head))
    if hook is not None:
        wide = add_hook_to_module(wide, hook)
    model.set_output_embeddings(wide)
