"""Shows the progress of an evaluation: a live line for each arm in a terminal, otherwise a plain line every 10 s."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from cluster.jobs.config import Arm
from cluster.jobs.sample import Sample

PLAIN_EVERY_S = 10.0
ALL = "all"


class Progress:
    """Counts tokens, and samples by arm. totals: the samples of each arm. Use as a context manager."""

    def __init__(
        self,
        console: Console,
        totals: Mapping[Arm, int],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._clock = console, clock
        self._totals = {str(arm): count for arm, count in totals.items()}
        self._totals[ALL] = sum(totals.values())
        self._done, self._right = Counter[str](), Counter[str]()
        self._before = self._tokens = 0
        self._began = self._printed_at = clock()
        self._bars = Bars(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._lines: dict[str, TaskID] = {
            name: self._bars.add_task(name, total=total, note="") for name, total in self._totals.items()
        }

    def __enter__(self) -> Self:
        self._began = self._printed_at = self._clock()
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        if not self._console.is_terminal:
            self._print_line()

    @property
    def summary(self) -> str:
        """Finished samples, tokens per second and remaining time."""
        return f"{self._done[ALL]} of {self._totals[ALL]} samples, {self._rates()}"

    def resumed(self, arm: Arm, sample: Sample) -> None:
        """Count a sample of an earlier start."""
        self._before += 1
        self._count(arm, sample)

    def add_tokens(self, tokens: int) -> None:
        """Count generated tokens."""
        self._tokens += tokens
        if not self._console.is_terminal and self._clock() - self._printed_at >= PLAIN_EVERY_S:
            self._print_line()

    def finished(self, arm: Arm, sample: Sample) -> None:
        """Count a new sample."""
        self._count(arm, sample)

    def _count(self, arm: Arm, sample: Sample) -> None:
        for name in (str(arm), ALL):
            self._done[name] += 1
            self._right[name] += sample.right
            note = self._rates() if name == ALL else f"{self._right[name] / self._done[name]:.1%} right"
            self._bars.update(self._lines[name], completed=self._done[name], note=note)

    def _rates(self) -> str:
        elapsed = max(self._clock() - self._began, 1e-9)
        new = self._done[ALL] - self._before
        left = self._totals[ALL] - self._done[ALL]
        eta = "?" if left and not new else _duration(left * elapsed / max(new, 1))
        return f"{self._tokens / elapsed:,.0f} tokens/s, {eta} left"

    def _print_line(self) -> None:
        self._printed_at = self._clock()
        shares = [f"{name} {self._right[name]}/{self._done[name]} right" for name in self._totals if self._done[name]]
        self._console.print(f"{self.summary}; {', '.join(shares)}", highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"
