"""The schedule of alpha, the strength of guidance: `Guidance.alpha_at` gives alpha for each generated token.

z = z_target + alpha * (z_guider - z_guider_base)    (arXiv 2507.12759, equation 1)

`actors.decoding.session.Session.alpha` asks for it, and `actors.decoding.arithmetic.combine` applies it to logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from actors.api.message import Message

MAX_ALPHA = 1_000.0  # far beyond any use, and far from what overflows


@dataclass(frozen=True, slots=True)
class Guidance(Message):
    """The strength of guidance over a session's tokens.

    alpha: strength of the guidance, from -MAX_ALPHA to MAX_ALPHA; 0 runs the target alone.
    warmup_tokens: alpha is 0 for the first so many generated tokens (published runs: 100), whatever the schedule says.
    schedule: pairs (generated tokens, alpha) with rising positions. Each alpha holds from its position on; before the
        first position `alpha` holds. Example: alpha 1, schedule ((200, 0.5),): tokens 0 to 199 use 1, later ones 0.5.
    guide: "always", or "thinking" for guidance until the thinking ends.
    Raises ValueError for other values.
    """

    alpha: float = 1.0
    warmup_tokens: int = 0
    schedule: tuple[tuple[int, float], ...] = ()
    guide: Literal["always", "thinking"] = "always"
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for alpha in (self.alpha, *(alpha for _, alpha in self.schedule)):
            if not math.isfinite(alpha) or abs(alpha) > MAX_ALPHA:
                raise ValueError(f"alpha must be a finite number from {-MAX_ALPHA:g} to {MAX_ALPHA:g}, not {alpha}")
        if self.warmup_tokens < 0:
            raise ValueError(f"warmup_tokens must be 0 or more, not {self.warmup_tokens}")
        starts = [start for start, _ in self.schedule]
        if any(start < 0 for start in starts) or starts != sorted(set(starts)):
            raise ValueError(f"the schedule's positions must be 0 or more and rise, not {starts}")
        if self.guide not in ("always", "thinking"):
            raise ValueError(f'guide must be "always" or "thinking", not {self.guide!r}')

    def alpha_at(self, generated: int, thinking_over: bool = False) -> float:
        """Alpha for the token that follows `generated` generated tokens."""
        if generated < self.warmup_tokens or (thinking_over and self.guide == "thinking"):
            return 0.0
        alpha = self.alpha
        for start, piece in self.schedule:
            if generated >= start:
                alpha = piece
        return alpha

    def never_guides(self) -> bool:
        """True if alpha is 0 at every token, so that the small models are not needed."""
        return self.alpha == 0 and all(alpha == 0 for _, alpha in self.schedule)
