"""TRL's DPO trainer for pairs that are already token ids, optionally with the guided model as its policy.

With the guided objective, policy and reference are z_target + alpha * (z_guider - z_guider_base) with the trained and
the untrained guider, so that training optimises the decoded distribution. Target and guider base enter as slices (see
`events`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import FusedCausalLMOutput

from cluster.jobs.dpo.event_logprobs import Slices, guided_log_probs, log_events
from cluster.jobs.dpo.prepared import SIDES

CHUNK = 512  # positions whose full logits are in memory at once


class PairTrainer(DPOTrainer):  # type: ignore[misc]  # TRL has no types
    """TRL's trainer on rows of `PairIds`. guided_alpha: alpha of the guided objective; None: the guider's objective."""

    _signature_columns: list[str] | None

    def __init__(self, *args: Any, guided_alpha: float | None = None, **keywords: Any) -> None:
        self._guided_alpha = guided_alpha  # before TRL's constructor, which computes the reference
        super().__init__(*args, **keywords)

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset  # TRL would expect texts, and append an end token to truncated answers too

    def _set_signature_columns_if_needed(self) -> None:
        first = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if first and self._guided_alpha is not None:
            assert self._signature_columns is not None
            self._signature_columns += [slices_column(side) for side in SIDES]

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if self._guided_alpha is not None and name == "train":  # the first call after TRL has installed its own head
            add_guided_head(self.model.get_base_model(), self._guided_alpha)
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write no card into checkpoints."""


@dataclass
class GuidedCollator(DataCollatorForPreference):  # type: ignore[misc]
    """TRL's batch with the slices of its answers end to end, in the order of its rows."""

    slice_width: int = 0

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch with slice_ids [answer tokens, k + 1] and slice_fixed [answer tokens, k + 2]."""
        batch: dict[str, Any] = super().torch_call(examples)
        slices = [Slices.unpack(row[slices_column(side)], self.slice_width) for side in SIDES for row in examples]
        batch["slice_ids"] = torch.from_numpy(np.concatenate([each.ids for each in slices]).astype(np.int64))
        batch["slice_fixed"] = torch.from_numpy(np.concatenate([each.fixed for each in slices]).astype(np.float32))
        return batch


def slices_column(side: str) -> str:
    """The column with the packed slices of an answer."""
    return f"{side}_slices"


def add_guided_head(model: PreTrainedModel, alpha: float) -> None:
    """Replace `model.forward`: calls with slices return log-probabilities of the guided distribution to TRL.

    Calls without slices use the previous forward.
    """
    plain = model.forward

    def forward(*args: Any, slice_ids: Tensor | None = None, slice_fixed: Tensor | None = None, **keywords: Any) -> Any:
        if slice_ids is None or slice_fixed is None:
            return plain(*args, **keywords)
        labels = keywords.pop("labels")[:, 1:]
        keywords.pop("fused_lm_head")
        states = model.base_model(*args, **keywords).last_hidden_state[:, :-1]
        learned = labels != -100
        parts = [
            checkpoint(_head, model, states[learned][first : first + CHUNK], ids, fixed, alpha, use_reentrant=False)
            for first, (ids, fixed) in _chunks(slice_ids, slice_fixed)
        ]
        own, entropy, top = (torch.cat(each) for each in zip(*parts, strict=True))
        return FusedCausalLMOutput(
            log_probs=_spread(own, learned),
            entropy=_spread(entropy, learned),
            is_top1=_spread(top, learned),
            mean_logits=torch.zeros_like(learned, dtype=own.dtype),  # unknown for the guided model
        )

    model.forward = forward


def _chunks(*tensors: Tensor) -> list[tuple[int, Sequence[Tensor]]]:
    return [(first, [each[first : first + CHUNK] for each in tensors]) for first in range(0, len(tensors[0]), CHUNK)]


def _head(model: PreTrainedModel, states: Tensor, ids: Tensor, fixed: Tensor, alpha: float) -> tuple[Tensor, ...]:
    """For n positions: log-probability of the own token, entropy of the events, True if the own token is likeliest."""
    logits = model.get_output_embeddings()(states)
    logs = guided_log_probs(log_events(logits, ids), fixed, alpha)
    with torch.no_grad():
        entropy, top = -(logs.exp() * logs).sum(-1), logs.argmax(-1) == 0
    return logs[:, 0], entropy, top


def _spread(values: Tensor, where: Tensor) -> Tensor:
    """[rows, length] with `values` where `where` is true, zeros elsewhere."""
    return torch.zeros_like(where, dtype=values.dtype).masked_scatter(where, values)
