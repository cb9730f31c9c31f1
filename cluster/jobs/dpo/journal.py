"""The metrics of a training run: a file of JSON lines in the run's folder, and a plot of them.

A worker writes the file to storage that every node sees, and the job reads it at the same time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from cluster.jobs.jsonl import rows, write_file

FILE, PLOT = "metrics.jsonl", "training.png"


@dataclass(frozen=True, slots=True)
class Line:
    """Means over the steps since the previous line, or over the validation pairs.

    margin: reward of chosen minus rejected, where a reward is beta times the log-ratio to the reference. accuracy:
    share of pairs with a positive margin.
    """

    step: int
    split: str  # train or validation
    loss: float
    margin: float
    accuracy: float

    @classmethod
    def of(cls, step: int, logs: Mapping[str, Any]) -> Self | None:
        """The line in TRL's logs; None if they hold no metrics of pairs."""
        prefix = "eval_" if "eval_loss" in logs else ""
        if f"{prefix}rewards/margins" not in logs:
            return None
        names = (f"{prefix}loss", f"{prefix}rewards/margins", f"{prefix}rewards/accuracies")
        return cls(step, "validation" if prefix else "train", *(float(logs[name]) for name in names))


class Journal:
    """The file of a run's lines."""

    def __init__(self, run: Path) -> None:
        self._run, self._file = run, run / FILE

    def begin(self, step: int) -> None:
        """Remove the lines after `step`, because training repeats these steps."""
        kept = [line for line in self.lines() if line.step <= step]
        write_file(self._file, "".join(json.dumps(asdict(line)) + "\n" for line in kept).encode())

    def add(self, line: Line) -> None:
        """Append a line."""
        with self._file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(asdict(line)) + "\n")

    def lines(self) -> list[Line]:
        """All complete lines; a line that is being written is left out. Raises UnreadableLine."""
        return [Line(**row) for row in rows(self._file)]

    def plot(self) -> Path:
        """Plot loss, margin and accuracy over the steps into the run's folder. Returns the file."""
        from matplotlib.figure import Figure  # a second of import

        figure = Figure(figsize=(12, 3.5), layout="constrained")
        lines = self.lines()
        for axes, name in zip(figure.subplots(1, 3), ("loss", "margin", "accuracy"), strict=True):
            for split, style in (("train", "-"), ("validation", "o--")):
                steps, values = _series(lines, split, name)
                axes.plot(steps, values, style, label=split, markersize=4)
            axes.set(title={"margin": "reward margin", "accuracy": "reward accuracy"}.get(name, name), xlabel="step")
            axes.grid(alpha=0.3)
            axes.legend()
        path = self._run / PLOT
        figure.savefig(path, dpi=120)
        return path


def _series(lines: Sequence[Line], split: str, name: str) -> tuple[list[int], list[float]]:
    selected = [line for line in lines if line.split == split]
    return [line.step for line in selected], [getattr(line, name) for line in selected]
