"""Supervised training of a guider whose adapter changes the steps of a solution, and none of its facts.

Guidance passes on whatever training changed in the guider: z_target + alpha * (z_guider - z_guider_base). A guider that
learns facts passes on those of its training problems, right or wrong for others, and where it is only left untrained,
what it learned around a fact spreads to it. So at each token of a fact the guider is held to its base's distribution:

    loss = mean over learned tokens of -log p_guider(token) + mean over tokens of facts of KL(p_base || p_guider)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import Trainer

UNUSED, FACT = -100, -200  # labels of tokens that are not learned: those of prompts and padding, and those of facts


class AnchoredTrainer(Trainer):  # type: ignore[misc]  # transformers has no types
    """transformers' trainer of a PEFT model on columns input_ids and labels. The model without its adapter is the base.

    It logs, beside the loss, `anchor`, the mean KL divergence of the last step, in nats.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._anchor = 0.0

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """The loss of a batch. inputs: input_ids, attention_mask and labels, each [B, T]."""
        labels = inputs.pop("labels")[:, 1:]
        states, head = _states(model, inputs), model.get_output_embeddings()
        learned, facts = labels >= 0, labels == FACT
        loss = cross_entropy(head(states[learned]), labels[learned])
        anchor = loss.new_zeros(())
        if (rows := facts.any(1)).any():
            with torch.no_grad(), model.disable_adapter():
                before = _states(model, {name: value[rows] for name, value in inputs.items()})
                base = log_softmax(head(before[facts[rows]]), -1)
            own = log_softmax(head(states[facts]), -1)
            anchor = kl_div(own, base, reduction="batchmean", log_target=True)
        self._anchor = float(anchor.detach())
        return loss + anchor

    def log(self, logs: dict[str, float], *args: Any, **keywords: Any) -> None:
        """Log, with the anchor of the last step."""
        super().log(logs | {"anchor": self._anchor} if "loss" in logs else logs, *args, **keywords)


def _states(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The last hidden states [B, T - 1, hidden], each of which predicts the next token."""
    states: Tensor = model.get_base_model().model(**inputs, use_cache=False).last_hidden_state
    return states[:, :-1]
