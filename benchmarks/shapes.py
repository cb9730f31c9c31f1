"""The sizes of models that decoding is measured with, and the configuration of a service of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from actors.api.generation import ROLES, Role
from actors.config import ServiceConfig, load_config
from benchmarks.sizes import QWEN_1_5B, QWEN_32B, sizes
from tests.support.local_service import WEIGHTS

POSITIONS = 1 << 17
Sizes = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Shape:
    """Qwen2 models of a target's and a small model's sizes, or models from folders.

    together: True if service and baselines fit side by side. Else the baselines are measured before the service.
    folders: of each role's model in Hugging Face layout, instead of sizes. adapter: the folder of a LoRA adapter of the
    guider, beside folders.
    """

    name: str
    target: Sizes | None = None  # fields of a Qwen2Config
    small: Sizes | None = None
    dtype: str = "float32"
    device: str = "cpu"
    together: bool = True
    folders: Mapping[Role, Path] | None = None
    adapter: Path | None = None

    def sizes(self, role: Role) -> Sizes | None:
        """The fields of a role's Qwen2Config."""
        return self.target if role == "target" else self.small

    def weights(self, role: Role) -> dict[str, Any]:
        """The keys of a role's model section that name its weights in `folders`, and their form."""
        assert self.folders is not None
        named = {"path": str(self.folders[role]), "dtype": self.dtype, "device": self.device}
        return named | ({"adapter": str(self.adapter)} if role == "guider" and self.adapter else {})

    @property
    def common(self) -> int:
        """Tokens that all roles have."""
        assert self.target is not None
        assert self.small is not None
        return min(self.target["vocab_size"], self.small["vocab_size"])

    @property
    def simulated(self) -> bool:
        """True if the models only take the time of a GPU: no figure of theirs is one of real models."""
        return False


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", sizes(2, 96, 128, 4, 2, 1_009), sizes(1, 48, 64, 4, 2, 1_001)),
        Shape("laptop", sizes(12, 768, 3_072, 12, 4, 32_000), sizes(4, 256, 1_024, 4, 2, 32_000)),
        Shape("trio", folders={role: WEIGHTS / role for role in ROLES}),
        Shape("qwen32b", QWEN_32B, QWEN_1_5B, dtype="bfloat16", device="cuda", together=False),
    )
}


def service_config(
    shape: Shape, folder: Path, *, cache_tokens: int, sessions: int, speculate: bool, adapt: bool = True
) -> ServiceConfig:
    """The configuration of a service of this shape; made-up words of its vocabulary are written into `folder`."""
    if shape.folders is None:
        each: dict[str, Any] = {"dtype": shape.dtype, "device": shape.device}
        sections = {role: each | {"path": str(_vocabulary(folder / role, shape, role))} for role in ROLES}
    else:
        sections = {role: shape.weights(role) for role in ROLES}
    return load_config(
        {
            "version": 1,
            "models": {role: section | {"cache_tokens": cache_tokens} for role, section in sections.items()},
            "beyond_context": "continue",
            "speculation": {"drafts": 7 if speculate else 0, "adapt": adapt},
            "coordinator": {"max_sessions": sessions, "max_waiting": sessions},
            "exchange": {"audit_every": 0},  # whole rows at chance times would be noise here
        }
    )


def _vocabulary(folder: Path, shape: Shape, role: Role) -> Path:
    sizes = shape.sizes(role)
    assert sizes is not None
    folder.mkdir()
    words = {f"<{token:x}>": token for token in range(shape.common)}
    Tokenizer(models.WordLevel(words, unk_token="<0>")).save(str(folder / "tokenizer.json"))  # noqa: S106
    settings: dict[str, Any] = {"vocab_size": sizes["vocab_size"], "max_position_embeddings": POSITIONS}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def cache_tokens(sessions: int, context: int, tokens: int) -> int:
    """A cache that holds `sessions` of at most so many prompt and answer tokens, with room to move them."""
    return 2 * sessions * (context + tokens + 64)


def spread(mean: int, count: int) -> Sequence[int]:
    """`count` lengths from half of `mean` to one and a half of it, evenly; only `mean` for one."""
    if count == 1:
        return [mean]
    return [max(1, round(mean * (0.5 + index / (count - 1)))) for index in range(count)]
