"""The published way to guide a target of another family: ids mapped one to one.

A target's token that is no token of the small models gets no delta, which is taken of logits, and the small models read
an unknown token in its place. Plain transformers forwards, greedy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from actors.api.generation import ROLES, Role
from actors.config import ServiceConfig
from actors.preflight import load_tokenizers
from benchmarks.byte_tokenizer import ByteTokenizer


class OneToOne:
    """The three models of a configuration, guided the published way."""

    def __init__(self, config: ServiceConfig) -> None:
        self.tokenizers = load_tokenizers(config)
        self._models: dict[Role, PreTrainedModel] = {
            role: AutoModelForCausalLM.from_pretrained(config.models.role(role).path).eval() for role in ROLES
        }
        target, guider = self.tokenizers["target"], self.tokenizers["guider"]
        mapped = ByteTokenizer(guider).counterparts(ByteTokenizer(target))
        mapped[list(target.eos_ids)] = guider.eos_ids[0]
        self._there, self._ids = torch.tensor(mapped >= 0), torch.tensor(mapped[mapped >= 0])
        unknown = guider.eos_ids[-1]  # the trio's padding, as in the published pair
        self._read = torch.tensor(np.where(mapped >= 0, mapped, unknown))

    @torch.no_grad()
    def replies(self, prompts: Mapping[Role, Sequence[Sequence[int]]], alpha: float, limit: int) -> list[str]:
        """Answers to prompts of equal length, given by role in its own ids; at most `limit` tokens."""
        reads = {role: torch.tensor([list(ids) for ids in prompts[role]]) for role in ROLES}
        caches: dict[Role, object] = dict.fromkeys(ROLES)
        ends = torch.tensor(self.tokenizers["target"].eos_ids)
        finished = torch.zeros(len(reads["target"]), dtype=torch.bool)
        said: list[list[int]] = [[] for _ in finished]
        for _ in range(limit):
            rows: dict[Role, torch.Tensor] = {}
            for role, model in self._models.items():
                output = model(input_ids=reads[role], past_key_values=caches[role], use_cache=True, logits_to_keep=1)
                caches[role], rows[role] = output.past_key_values, output.logits[:, -1].double()
            combined = rows["target"]
            combined[:, self._there] += alpha * (rows["guider"] - rows["guider_base"])[:, self._ids]
            chosen = combined.argmax(-1)
            finished |= torch.isin(chosen, ends)
            for ids, token, over in zip(said, chosen.tolist(), finished.tolist(), strict=True):
                if not over:
                    ids.append(token)
            if bool(finished.all()):
                break
            mapped = self._read[chosen][:, None]
            reads = {"target": chosen[:, None], "guider": mapped, "guider_base": mapped}
        return [self.tokenizers["target"].decode(ids) for ids in said]
