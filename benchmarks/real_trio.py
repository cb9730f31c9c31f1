"""The published models of benchmarks as trios: a target of the small models' family, and one of another.

SmolLM2-135M-Instruct is the guider base and the target of its own family; Gemma 3 270M is the target of the other.
`python -m cluster.real --fetch` brings both. The guider is SmolLM2 with the adapter of this repository that was
trained to reason, or, where there is none, a perturbed copy of SmolLM2.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from safetensors.torch import load_file, save_file

from actors.api.generation import Role
from benchmarks.shapes import Shape
from cluster.real import models
from cluster.real.models import GEMMA3, SMOLLM2, RealModelError, fetched

Family: TypeAlias = Literal["same", "other"]  # of the target, compared with that of the small models
FAMILIES: tuple[Family, ...] = ("same", "other")
ADAPTER = Path(models.__file__).parent / "adapters" / "sft"
NOISE = 0.03  # of the standard deviation of each weight matrix: a perturbed guider's difference from its base


@dataclass(frozen=True, slots=True)
class RealTrio:
    """Folders of the models. guider: what the guider is, in words. adapter: is merged into the guider at its load."""

    small: Path
    large: Path
    guider_folder: Path
    adapter: Path | None
    guider: str

    def shape(self, family: Family) -> Shape:
        """The three models in float32 on the CPU."""
        target = self.small if family == "same" else self.large
        folders: dict[Role, Path] = {"target": target, "guider": self.guider_folder, "guider_base": self.small}
        return Shape(f"real-{family}", folders=folders, adapter=self.adapter)


def real_trio(work: Path, adapter: Path = ADAPTER) -> RealTrio:
    """The trio; a perturbed guider is written below `work`. Raises RealModelError if a model has not been fetched."""
    small, large = fetched(SMOLLM2), fetched(GEMMA3)
    if small is None or large is None:
        raise RealModelError("the real models are not here: run `python -m cluster.real --fetch`")
    if adapter.is_dir():
        return RealTrio(small, large, small, adapter, f"adapter {adapter.name}")
    return RealTrio(small, large, perturbed_copy(small, work / "guider"), None, "perturbed copy")


def perturbed_copy(model: Path, folder: Path) -> Path:
    """A copy of a model with noise on every weight matrix, from a fixed seed."""
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(file)
    for tensor in tensors.values():
        if tensor.dim() > 1:
            tensor += NOISE * tensor.std() * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, file, {"format": "pt"})
    return folder
