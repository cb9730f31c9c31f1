"""The published models of benchmarks as trios: a target of the small models' family, and one of another.

SmolLM2-135M-Instruct is the guider base and the target of its own family; Gemma 3 270M is the target of the other.
`python -m cluster.real --fetch` brings both. The guider is SmolLM2 with the adapter of this repository.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from actors.api.generation import Role
from benchmarks.shapes import Shape
from cluster.real.models import ADAPTER, GEMMA3, SMOLLM2, RealModelError, fetched

Family: TypeAlias = Literal["same", "other"]  # of the target, compared with that of the small models
FAMILIES: tuple[Family, ...] = ("same", "other")


@dataclass(frozen=True, slots=True)
class RealTrio:
    """Folders of the models. adapter: is merged into the small one at its load, which makes it the guider."""

    small: Path
    large: Path
    adapter: Path

    def shape(self, family: Family) -> Shape:
        """The three models in float32 on the CPU."""
        target = self.small if family == "same" else self.large
        folders: dict[Role, Path] = {"target": target, "guider": self.small, "guider_base": self.small}
        return Shape(f"real-{family}", folders=folders, adapter=self.adapter)


def real_trio() -> RealTrio:
    """The trio. Raises RealModelError if a model has not been fetched."""
    small, large = fetched(SMOLLM2), fetched(GEMMA3)
    if small is None or large is None:
        raise RealModelError("the real models are not here: run `python -m cluster.real --fetch`")
    return RealTrio(small, large, ADAPTER)
