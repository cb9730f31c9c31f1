"""How a guider is trained: the YAML file of `cluster.jobs.train_dpo`.

The paper says: LoRA on the guider with about 78M parameters (rank 64 on all linear layers of a 1.5B model is 74M),
about 10,000 pairs, both kinds. It is silent on the rest; those defaults are ours, each with its reason beside it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from cluster.jobs.config import Section, validated
from cluster.jobs.pairs import KINDS, Kind
from cluster.serve_file import read_mapping


class Lora(Section):
    """The adapter, on every linear layer but the head. alpha: the update is scaled by alpha / rank."""

    rank: int = Field(64, ge=1)
    alpha: float = Field(64.0, gt=0)  # ours: a scale of 1, so that rank and learning rate can be chosen apart


class Training(Section):
    """One training run.

    objective: whose probability of an answer is raised and lowered: the guider's own, as in the paper, or that of the
    guided model, z_target + alpha * (z_guider - z_guider_base), which is what will be decoded. loss: "sft" is
    supervised tuning on the chosen answers alone, for comparison. beta: how dearly leaving the reference is paid (DPO,
    arXiv 2305.18290, equation 7). batch: pairs to a step over all workers; micro_batch: of one worker at once.
    max_tokens: of prompt and answer; a pair with a longer answer is left out and counted. every: steps from one
    validation and checkpoint to the next.
    """

    run: Path
    pairs: Path
    service: Path = Path("ray_config.yaml")
    kinds: tuple[Kind, ...] = Field(KINDS, min_length=1)
    objective: Literal["guider", "guided"] = "guider"
    alpha: float = Field(1.0, gt=0)  # of the guided objective: the strength that will be decoded with
    slice_width: int = Field(32, ge=1)  # of the guided objective: the target's likeliest tokens; the rest is one event
    loss: Literal["dpo", "sft"] = "dpo"
    beta: float = Field(0.1, gt=0)  # ours: the most used
    learning_rate: float = Field(1e-5, gt=0)  # ours: tens of times less than supervised LoRA takes, as DPO needs
    warmup: float = Field(0.1, ge=0, lt=1)  # share of the steps in which the rate rises; then it falls in a line
    epochs: float = Field(1.0, gt=0)  # ours: a second pass over 10,000 pairs mostly learns them by heart
    batch: int = Field(32, ge=1)
    micro_batch: int = Field(1, ge=1)
    max_tokens: int = Field(8_192, ge=2)  # the answers that the paper grades are no longer
    lora: Lora = Lora()
    gradient_checkpointing: bool = True
    seed: int = 0
    every: int = Field(50, ge=1)
    workers: int = Field(1, ge=1)
    gpus: float | None = Field(None, ge=0)  # of each worker; None: one where the cluster has any
    cpus: float = Field(1.0, ge=0)  # of each worker
    label_selector: dict[str, str] = Field(default_factory=dict)
    max_failures: int = Field(3, ge=0)  # workers that die before it is given up; each time from the last checkpoint

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        together = self.micro_batch * self.workers
        if self.batch % together:
            raise ValueError(f"batch ({self.batch}) must be a multiple of micro_batch x workers ({together})")
        return self

    def steps(self, pairs: int) -> int:
        """Of the whole run over so many pairs."""
        return math.ceil(self.epochs * math.ceil(pairs / self.batch))


def load_training(path: Path) -> Training:
    """The training in a file. Raises ConfigError that names every key that is wrong."""
    return validated(Training, dict(read_mapping(path)))
