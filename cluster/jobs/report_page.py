"""Renders the report of a run as one HTML page that loads nothing: styles, plots and texts are inside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cluster.jobs.contrasts import Contrast
from cluster.jobs.plots import over_alpha, over_tokens
from cluster.jobs.summary import Summary
from cluster.jobs.tables import completeness, tables, verdict

LONGEST = 6_000  # characters of an answer that are shown; of a longer answer, both ends
_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,  # answers and questions are text of strangers
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)


def page(name: str, summary: Summary, differing: Sequence[Contrast]) -> str:
    """The whole page of a run, from `report_page.html.jinja` beside this module."""
    return _TEMPLATES.get_template("report_page.html.jinja").render(
        name=name,
        verdict=verdict(summary),
        completeness=completeness(summary),
        tables=tables(summary),
        plots=[("Accuracy against alpha", over_alpha(summary)), ("Accuracy against tokens", over_tokens(summary))],
        contrasts=differing,
        shorten=shorten,
    )


def shorten(text: str, longest: int = LONGEST) -> str:
    """`text`, or both ends of a longer one, around a note of how many characters are left out."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]}\n\n[… {len(text) - 2 * half:,} characters left out …]\n\n{text[-half:]}"
