"""Guided decoding without a service: transformers models, threads and DynamicCache in one process.

`loop` is what the published code does: one sequence at a time, the three models in three threads, whole rows to the
CPU at every token, combined and sampled there. `static` is the same with a left-padded batch: a finished row keeps its
place until the longest is done.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from actors.api.generation import ROLES, Role
from actors.replica.process import on_temporary_thread
from benchmarks.agreement import agreeing_model
from benchmarks.shapes import Shape
from tests.support.local_service import WEIGHTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Task:
    """One sequence to decode: its prompt in each role's tokens, and how many tokens come after it."""

    prompts: dict[Role, list[int]]
    tokens: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """The answers of some tasks, in their order, and the seconds that all of them took together."""

    answers: list[list[int]]
    seconds: float

    @property
    def tokens(self) -> int:
        """Number of tokens of all answers."""
        return sum(len(answer) for answer in self.answers)


class Baselines:
    """The three models of a shape, in this process."""

    def __init__(self, shape: Shape, agreement: float, threads: int, alpha: float = 1.0) -> None:
        torch.set_num_threads(threads)
        self._models: dict[Role, PreTrainedModel] = {
            role: on_temporary_thread(partial(_model, shape, role, agreement)) for role in ROLES
        }
        self._alpha = alpha

    def loop(self, tasks: Sequence[Task], temperature: float) -> Decoded:
        """Guided, one task after another."""
        began = time.perf_counter()
        answers = [self._batch([task], ROLES, temperature)[0] for task in tasks]
        return Decoded(answers, time.perf_counter() - began)

    def static(self, tasks: Sequence[Task], temperature: float) -> Decoded:
        """Guided, all tasks in one padded batch."""
        began = time.perf_counter()
        return Decoded(self._batch(tasks, ROLES, temperature), time.perf_counter() - began)

    def target(self, tasks: Sequence[Task], temperature: float) -> Decoded:
        """The target alone, all tasks in one padded batch."""
        began = time.perf_counter()
        return Decoded(self._batch(tasks, ("target",), temperature), time.perf_counter() - began)

    def _batch(self, tasks: Sequence[Task], roles: Sequence[Role], temperature: float) -> list[list[int]]:
        longest = max(task.tokens for task in tasks)
        batches = [PaddedBatch(self._models[role], [task.prompts[role] for task in tasks], longest) for role in roles]
        with ThreadPoolExecutor(len(roles), "model") as threads:  # not kept, where idle ones could use cores
            rows = list(threads.map(PaddedBatch.prefill, batches))
            chosen = [choose(combine(rows, self._alpha), temperature)]
            while len(chosen) < longest:
                rows = list(threads.map(PaddedBatch.step, batches, [chosen[-1]] * len(batches)))
                chosen.append(choose(combine(rows, self._alpha), temperature))
        answers: list[list[int]] = torch.stack(chosen, dim=1).tolist()
        return [answer[: task.tokens] for answer, task in zip(answers, tasks, strict=True)]


class PaddedBatch:
    """Sequences of one model, padded on the left, and their cache."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        width = max(map(len, prompts))
        self._model, self._cache, self._held = model, DynamicCache(), 0
        self._prompts = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=model.device)
        self._lengths = torch.tensor([len(p) for p in prompts], device=model.device)
        real = torch.arange(width, device=model.device) >= width - self._lengths[:, None]
        self._mask = torch.cat([real.long(), real.new_ones(len(prompts), tokens).long()], dim=1)

    def prefill(self) -> Tensor:
        """The rows [B, V] after the prompts, float32, on the CPU."""
        positions = (self._mask[:, : self._prompts.shape[1]].cumsum(1) - 1).clamp(min=0)
        return self._forward(self._prompts, positions)

    def step(self, tokens: Tensor) -> Tensor:
        """The rows [B, V] after one more token [B] of each."""
        positions = self._lengths[:, None] + self._held - self._prompts.shape[1]
        return self._forward(tokens.to(self._model.device)[:, None], positions)

    @torch.inference_mode()
    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        self._held += ids.shape[1]
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask[:, : self._held] if len(ids) > 1 else None,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        rows: Tensor = output.logits[:, -1].float().cpu()
        return rows


def combine(rows: Sequence[Tensor], alpha: float) -> Tensor:
    """z_target + alpha * (z_guider - z_guider_base) over the tokens that all have; the target's row if it is alone."""
    if len(rows) == 1:
        return rows[0]
    target, guider, guider_base = rows
    common = min(row.shape[1] for row in rows)
    z = target.clone()
    z[:, :common] += alpha * (guider[:, :common] - guider_base[:, :common])
    return z


def choose(z: Tensor, temperature: float) -> Tensor:
    """One token of each row [B, V]; the largest at temperature 0."""
    if not temperature:
        return z.argmax(1)
    return torch.multinomial(torch.softmax(z / temperature, 1), 1)[:, 0]


def _model(shape: Shape, role: Role, agreement: float) -> PreTrainedModel:
    if shape.target is not None:
        return agreeing_model(shape, role, agreement)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(WEIGHTS / role)
    return model.eval()
