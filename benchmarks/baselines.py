"""Decoding without a service: transformers models, threads and DynamicCache in one process.

`loop` is what the published code does: one sequence at a time, the three models in three threads, whole rows to the
CPU at every token, combined and sampled there. `static` is the same with a left-padded batch: a finished row keeps its
place until the longest is done. `generate` is transformers' own loop over the target, with such a batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from actors.api.generation import ROLES, Role
from actors.engine.loader import ModelSource, load_model
from actors.replica.process import on_temporary_thread
from benchmarks.agreement import agreeing_model
from benchmarks.peak_memory import PeakMemory
from benchmarks.shapes import Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Task:
    """One sequence to decode: its prompt in each role's tokens, and how many tokens come after it."""

    prompts: dict[Role, list[int]]
    tokens: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """The answers of some tasks, in their order, and the seconds that all of them took together.

    first_s: by task, the seconds until its first token was known. Those of a task count from its own start.
    """

    answers: list[list[int]]
    seconds: float
    first_s: list[float] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Number of tokens of all answers."""
        return sum(len(answer) for answer in self.answers)


class Baselines(PeakMemory):
    """The models of a shape, in this process. roles: those that are loaded; without all three, only the target runs."""

    def __init__(
        self, shape: Shape, agreement: float, threads: int, roles: Sequence[Role] = ROLES, alpha: float = 1.0
    ) -> None:
        torch.set_num_threads(threads)
        self._models: dict[Role, PreTrainedModel] = {
            role: on_temporary_thread(partial(_model, shape, role, agreement)) for role in roles
        }
        self._alpha = alpha

    def loop(self, tasks: Sequence[Task], temperature: float) -> Decoded:
        """Guided, one task after another."""
        each = [self._batch([task], ROLES, temperature) for task in tasks]
        return Decoded(
            [decoded.answers[0] for decoded in each],
            sum(decoded.seconds for decoded in each),
            [decoded.first_s[0] for decoded in each],
        )

    def static(self, tasks: Sequence[Task], temperature: float) -> Decoded:
        """Guided, all tasks in one padded batch."""
        return self._batch(tasks, ROLES, temperature)

    def target(self, tasks: Sequence[Task], temperature: float) -> Decoded:
        """The target alone, all tasks in one padded batch."""
        return self._batch(tasks, ("target",), temperature)

    @torch.inference_mode()
    def generate(self, tasks: Sequence[Task]) -> Decoded:
        """The target alone by `generate()`, greedy, all tasks in one padded batch; end tokens do not end an answer."""
        model, stamps = self._models["target"], TokenTimes()
        ids, real = left_padded([task.prompts["target"] for task in tasks], model.device)
        longest = max(task.tokens for task in tasks)
        # This also replaces what the checkpoint recommends, its end tokens included.
        model.generation_config = GenerationConfig(max_new_tokens=longest, do_sample=False, pad_token_id=0)
        began = time.perf_counter()
        decoded = model.generate(ids, attention_mask=real.long(), streamer=stamps)
        seconds = time.perf_counter() - began
        rows: list[list[int]] = decoded[:, ids.shape[1] :].tolist()
        answers = [row[: task.tokens] for row, task in zip(rows, tasks, strict=True)]
        return Decoded(answers, seconds, [stamps.times[1] - began] * len(tasks))  # the first time is the prompts'

    def _batch(self, tasks: Sequence[Task], roles: Sequence[Role], temperature: float) -> Decoded:
        began = time.perf_counter()
        longest = max(task.tokens for task in tasks)
        batches = [PaddedBatch(self._models[role], [task.prompts[role] for task in tasks], longest) for role in roles]
        with ThreadPoolExecutor(len(roles), "model") as threads:  # not kept, where idle ones could use cores
            rows = list(threads.map(PaddedBatch.prefill, batches))
            chosen = [choose(combine(rows, self._alpha), temperature)]
            first_s = time.perf_counter() - began
            while len(chosen) < longest:
                rows = list(threads.map(PaddedBatch.step, batches, [chosen[-1]] * len(batches)))
                chosen.append(choose(combine(rows, self._alpha), temperature))
        answers: list[list[int]] = torch.stack(chosen, dim=1).tolist()
        cut = [answer[: task.tokens] for answer, task in zip(answers, tasks, strict=True)]
        return Decoded(cut, time.perf_counter() - began, [first_s] * len(tasks))


class TokenTimes:
    """A streamer of `generate()`: records when the prompts, and then each token of a batch, came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called with the prompts, then with each token of the batch."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called behind the last token."""


class PaddedBatch:
    """Sequences of one model, padded on the left, and their cache."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        self._model, self._cache, self._held = model, DynamicCache(), 0
        self._prompts, real = left_padded(prompts, model.device)
        self._lengths = real.sum(1)
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


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as ids [B, width], padded with 0 on the left, and True [B, width] where an id is one of the prompt."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return ids, torch.arange(width, device=device) >= width - lengths[:, None]


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
    if shape.folders is None:
        return agreeing_model(shape, role, agreement)
    return load_model(ModelSource(**shape.weights(role))).model
