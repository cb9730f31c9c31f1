"""Plots of the saved results: one page of decoding speed, and the accuracy plot of the README.

    python -m benchmarks.plots

Reads benchmarks/results/decode-*.json and scaling-*.json and writes benchmarks/results/plots.png; reads
benchmarks/results/effect-*.json and writes docs/accuracy.png. The last line is a JSON object with the files read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker

from benchmarks.results_file import RESULTS, publish

matplotlib.use("Agg")
from matplotlib import pyplot  # after the choice of what draws

ACCURACY = Path(__file__).parent.parent / "docs" / "accuracy.png"
BARS = (
    ("target", "target alone", "#9aa0c3"),
    ("guider", "guider alone", "#f2c879"),
    ("guided", "guided target", "#3846b8"),
)
RATIOS = ("guided_over_target", "guided_over_plain", "guided_over_target_drafted", "guided_over_static")
Result = dict[str, Any]


def draw(folder: Path) -> list[str]:
    """Draw the results in `folder` into its plots.png; the names of the files that were read."""
    panels: list[tuple[str, Callable[[Any, str, Any], None]]] = [
        ("decode-*-sweep-*.json", _sweep),
        ("decode-*.json", _ratios),
        ("scaling-*.json", _scaling),
    ]
    found = [(sorted(folder.glob(pattern)), panel) for pattern, panel in panels]
    files = [
        (file, panel) for some, panel in found for file in some if panel is not _ratios or "-sweep-" not in file.name
    ]
    figure, axes = pyplot.subplots(max(1, len(files)), 1, figsize=(9, 4.5 * max(1, len(files))), squeeze=False)
    for (file, panel), axis in zip(files, axes[:, 0], strict=False):
        kept = json.loads(file.read_text(encoding="utf-8"))
        hardware = kept["hardware"]
        where = hardware["gpus"][0] if hardware["gpus"] else f"{hardware['processor']}, {hardware['cores']} cores"
        axis.set_title(f"{file.stem}\n{where}, {kept['date'][:10]}", fontsize=9)
        panel(axis, file.stem, kept["result"])
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "plots.png", dpi=110)
    pyplot.close(figure)
    return [file.name for file, _ in files]


def _sweep(axis: Any, name: str, result: list[Result]) -> None:
    """Ratios and acceptance over agreement, a line for each number of sessions."""
    for sessions in sorted({row["sessions"] for row in result}):
        rows = sorted((r for r in result if r["sessions"] == sessions), key=lambda row: float(row["agreement"]))
        for key in ("guided_over_target", "guided_over_plain", "acceptance"):
            points = [(row["agreement"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=f"{key}, {sessions} sessions")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xlabel("agreement of guider and combined choice")


def _ratios(axis: Any, name: str, result: Result | list[Result]) -> None:
    """Ratios as bars, grouped by number of sessions."""
    rows = result if isinstance(result, list) else [result]
    keys = [key for key in RATIOS if any(row.get(key) is not None for row in rows)]
    width = 0.8 / max(1, len(keys))
    for index, key in enumerate(keys):
        axis.bar(
            [place + index * width for place in range(len(rows))], [row.get(key) or 0 for row in rows], width, label=key
        )
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xticks(range(len(rows)), [f"{row['sessions']} sessions" for row in rows])


def _scaling(axis: Any, name: str, result: Result) -> None:
    """A guided step's time against sessions and against context, both axes logarithmic."""
    for key, curve in result.items():
        points = sorted((int(n), took) for n, took in curve["step_ms"].items())
        share = curve["quadratic_share"]
        axis.plot(*zip(*points, strict=True), marker="o", label=f"{key}; quadratic share at the end {share:.2f}")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xlabel("sessions, or tokens of context of one session")
    axis.set_ylabel("ms a guided step")


def draw_accuracy(file: Path, picture: Path) -> None:
    """Bars of the accuracies that `benchmarks.effect --save` wrote to `file`: over all questions, and by hops."""
    kept = json.loads(file.read_text(encoding="utf-8"))
    result = kept["result"]
    groups = {f"all {result['n']}\nquestions": result}
    groups |= {f"{hops} hops": row for hops, row in result["by_hops"].items()}
    figure, axis = pyplot.subplots(figsize=(8, 3.4))
    width = 0.8 / len(BARS)
    for place, (mode, label, colour) in enumerate(BARS):
        shares = [row[mode] for row in groups.values()]
        bars = axis.bar([at + place * width for at in range(len(groups))], shares, width, label=label, color=colour)
        axis.bar_label(bars, labels=[f"{100 * share:g}%" for share in shares], fontsize=7, padding=2)
    axis.set_xticks([at + width for at in range(len(groups))], list(groups))
    axis.set_ylim(0, 1.08)
    axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    axis.set_title(f"Right answers to held-out questions, alpha {result['alpha']:g}, greedy", fontsize=11, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(length=0)
    axis.legend(fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=len(BARS))
    figure.tight_layout()
    figure.savefig(picture, dpi=150)
    pyplot.close(figure)


def main() -> None:
    drawn = draw(RESULTS)
    for file in sorted(RESULTS.glob("effect-*.json"))[:1]:
        draw_accuracy(file, ACCURACY)
        drawn.append(file.name)
    publish("plots", {"drawn": drawn}, save=False)


if __name__ == "__main__":
    main()
