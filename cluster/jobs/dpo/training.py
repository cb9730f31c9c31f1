"""The YAML file of `cluster.jobs.train_dpo`.

The paper (arXiv 2507.12759) gives LoRA on the guider with about 78M parameters (rank 64 on all linear layers of a 1.5B
model is 74M) and about 10,000 pairs of both kinds. The other defaults are ours, each with its reason beside it.
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
    """A new LoRA adapter, on every linear layer except the head. alpha: the update is scaled by alpha / rank.

    A guider that has an adapter gets no new one.
    """

    rank: int = Field(64, ge=1)
    alpha: float = Field(64.0, gt=0)  # ours: a scale of 1, so that rank and learning rate are independent


class Training(Section):
    """One training run.

    objective: the model whose probability of an answer is optimised. "guider": the guider alone, as in the paper.
    "guided": z_target + alpha * (z_guider - z_guider_base), the distribution that will be decoded. loss: "sft" is
    supervised tuning on the chosen answers alone, for comparison. beta: weight of the distance from the reference
    (DPO, arXiv 2305.18290, equation 7). batch: pairs in a step of all workers. micro_batch: pairs in one forward of one
    worker. max_tokens: of prompt and answer; longer pairs are left out. every: steps between two validations and
    checkpoints.
    """

    run: Path
    pairs: Path
    service: Path = Path("ray_config.yaml")
    kinds: tuple[Kind, ...] = Field(KINDS, min_length=1)
    objective: Literal["guider", "guided"] = "guider"
    alpha: float = Field(1.0, gt=0)  # of the guided objective: the alpha that will be decoded with
    slice_width: int = Field(32, ge=1)  # of the guided objective: likeliest tokens of the target; the rest is one event
    loss: Literal["dpo", "sft"] = "dpo"
    beta: float = Field(0.1, gt=0)  # ours: the usual value
    learning_rate: float = Field(1e-5, gt=0)  # ours: DPO needs tens of times less than supervised LoRA
    warmup: float = Field(0.1, ge=0, lt=1)  # share of the steps in which the rate rises; then it falls linearly
    epochs: float = Field(1.0, gt=0)  # ours: a second pass over 10,000 pairs mostly memorises them
    batch: int = Field(32, ge=1)
    micro_batch: int = Field(1, ge=1)
    max_tokens: int = Field(8_192, ge=2)  # the paper's graded answers are no longer
    lora: Lora = Lora()
    gradient_checkpointing: bool = True
    seed: int = 0
    every: int = Field(50, ge=1)
    workers: int = Field(1, ge=1)
    gpus: float | None = Field(None, ge=0)  # of each worker; None: one if the cluster has any, else none
    cpus: float = Field(1.0, ge=0)  # of each worker
    label_selector: dict[str, str] = Field(default_factory=dict)
    max_failures: int = Field(3, ge=0)  # restarts from the last checkpoint before the job fails

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        together = self.micro_batch * self.workers
        if self.batch % together:
            raise ValueError(f"batch ({self.batch}) must be a multiple of micro_batch x workers ({together})")
        return self

    def steps(self, pairs: int) -> int:
        """Steps of the whole run over `pairs` pairs."""
        return math.ceil(self.epochs * math.ceil(pairs / self.batch))


def load_training(path: Path) -> Training:
    """The training in a file. Raises ConfigError naming every wrong key."""
    return validated(Training, dict(read_mapping(path)))
