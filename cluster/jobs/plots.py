"""The plots of a report as inline SVG. Their text and axes take the page's colour, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from cluster.jobs.statistics import Interval
from cluster.jobs.summary import TARGET, Score, Summary
from cluster.jobs.tables import task_title

# Okabe and Ito's colours: visible on white and near black, and distinguishable for colour-blind readers.
_COLOURS = {"target": "#0072B2", "guider": "#E69F00", "guider_base": "#CC79A7", "guided": "#009E73"}
_WARMUP_COLOURS = ("#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#E69F00")
_INK = "#010203"  # placeholder for the page's own colour
_SETTING = re.compile(r"a(-?[\d.]+(?:e[+-]?\d+)?)(?:-w(\d+))?")  # alpha and warm-up; schedules have other names
_ACROSS = 3  # plots in a row


def over_alpha(summary: Summary) -> str | None:
    """pass@1 over alpha, with a line for each warm-up and a level for each unguided mode; None without guidance."""
    points = _points_by_warmup(summary.overall)
    return _drawn(summary, "alpha", _over_alpha) if points else None


def over_tokens(summary: Summary) -> str:
    """pass@1 over the mean length of an answer, with a point for each mode and setting."""
    return _drawn(summary, "tokens", _over_tokens)


def _over_alpha(axis: Any, scores: Sequence[Score]) -> None:
    for colour, (warmup, points) in zip(_WARMUP_COLOURS * 9, sorted(_points_by_warmup(scores).items()), strict=False):
        label = "guided" + (f", warm-up {warmup}" if warmup else "")
        alphas, found = zip(*points, strict=True)
        axis.errorbar(alphas, [f.value for f in found], _bars(found), marker="o", capsize=3, color=colour, label=label)
    for score in scores:
        if score.variant.mode != "guided":
            level, colour = score.pass_at_1, _COLOURS[score.variant.mode]
            axis.axhline(level.value, color=colour, linestyle="--", linewidth=1.2, label=str(score.variant))
            if score.variant == TARGET:
                axis.axhspan(level.low, level.high, color=colour, alpha=0.12, linewidth=0)
    axis.set_xlabel("alpha")


def _over_tokens(axis: Any, scores: Sequence[Score]) -> None:
    for score in scores:
        colour, found = _COLOURS[score.variant.mode], score.pass_at_1
        axis.errorbar([score.cost.tokens], [found.value], _bars([found]), marker="o", capsize=3, color=colour)
        axis.annotate(
            str(score.variant), (score.cost.tokens, found.value), (5, 4), textcoords="offset points", fontsize=7
        )
    axis.set_xlabel("tokens an answer")
    axis.margins(x=0.18)


def _points_by_warmup(scores: Sequence[Score]) -> dict[int, list[tuple[float, Interval]]]:
    """By warm-up: (alpha, pass@1) by rising alpha. Schedules are left out."""
    points: dict[int, list[tuple[float, Interval]]] = {}
    for score in scores:
        found = _SETTING.fullmatch(score.variant.setting)
        if found:
            points.setdefault(int(found[2] or 0), []).append((float(found[1]), score.pass_at_1))
    return {warmup: sorted(row, key=lambda point: point[0]) for warmup, row in points.items()}


def _bars(found: Sequence[Interval]) -> list[list[float]]:
    """Lengths of the error bars below and above the values."""
    return [[max(0.0, f.value - f.low) for f in found], [max(0.0, f.high - f.value) for f in found]]


def _drawn(summary: Summary, name: str, panel: Callable[[Any, Sequence[Score]], None]) -> str:
    """The plot with a panel for each task and for the average."""
    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    style = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "font.family": "sans-serif"}
    with matplotlib.rc_context({**style, **dict.fromkeys(inks, _INK)}):
        across = min(_ACROSS, len(summary.scores))
        down = -(-len(summary.scores) // across)
        figure = Figure(figsize=(4.2 * across, 3.4 * down), layout="constrained")
        axes = figure.subplots(down, across, squeeze=False).flatten()
        for axis, (task, scores) in zip(axes, summary.scores.items(), strict=False):
            panel(axis, scores)
            axis.set_title(task_title(task, summary), fontsize=10)
            axis.set_ylabel("pass@1")
            axis.patch.set_alpha(0)
            axis.grid(alpha=0.2)
            axis.spines[["top", "right"]].set_visible(False)
        for axis in axes[len(summary.scores) :]:
            axis.set_visible(False)
        handles, labels = axes[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
        return _svg(figure, name)


def _svg(figure: Figure, name: str) -> str:
    """The figure as one SVG element without a date. Its ids begin with `name`, so that they are unique in the page."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
