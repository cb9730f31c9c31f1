"""Writes the report of an evaluation: one HTML page that loads nothing, and the same tables in Markdown.

    python -m cluster.jobs.evaluation_report RUN

Reads the folder of a run, finished or not, and writes RUN/report.html and RUN/report.md. The last line of output is
one JSON object with the overall figures.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.jobs.contrasts import Contrast, contrasts
from cluster.jobs.jsonl import UnreadableLine, write_file
from cluster.jobs.report_page import page
from cluster.jobs.results import Results, RunError
from cluster.jobs.statistics import Interval
from cluster.jobs.summary import Score, Summary, summarise
from cluster.jobs.tables import Table, completeness, tables, verdict

_EXCERPT = 100  # characters of a question in a Markdown table
FILES = ("report.html", "report.md")


def remove_report(folder: Path) -> None:
    """Delete the report of a run whose samples were deleted."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def write_report(folder: Path) -> dict[str, Any]:
    """Write both files of a run. Returns the overall figures. Raises RunError, UnreadableLine."""
    results = Results(folder)
    summary = summarise(results)
    differing = contrasts(results, summary.best.variant) if summary.best is not None else []
    html, text = (folder / file for file in FILES)
    name = folder.resolve().name
    write_file(html, page(name, summary, differing).encode())
    write_file(text, markdown(name, summary, differing).encode())
    return {**figures(summary), "html": str(html), "markdown": str(text)}


def figures(summary: Summary) -> dict[str, Any]:
    """The overall figures as plain data: accuracies in [0, 1], `gain` relative; None for missing figures."""
    return {
        "verdict": verdict(summary),
        "samples": summary.samples,
        "expected": summary.expected,
        "best": str(summary.best.variant) if summary.best is not None else None,
        "overall": {str(score.variant): _figures(score) for score in summary.overall},
    }


def markdown(name: str, summary: Summary, differing: Sequence[Contrast]) -> str:
    """The report in Markdown, without plots and long texts."""
    parts = [f"# {name}", verdict(summary), completeness(summary), *(_table(table) for table in tables(summary))]
    if differing:
        parts.append(_table(_contrasts(differing)))
    return "\n\n".join(parts) + "\n"


def _figures(score: Score) -> dict[str, Any]:
    return {
        "pass_at_1": _plain(score.pass_at_1),
        "pass_at": {str(k): value for k, value in score.pass_at.items()},
        "majority_at": {str(k): value for k, value in score.majority_at.items()},
        "gain": _plain(score.gain),
        "difference": _plain(score.difference),
        "p": score.p,
        "tokens": score.cost.tokens,
        "truncated": score.cost.truncated,
        "seconds": score.cost.seconds,
        "gpu_seconds": score.cost.gpu_seconds,
    }


def _plain(interval: Interval | None) -> list[float | None] | None:
    """[value, low, high], with None for infinite limits, which JSON cannot hold."""
    if interval is None:
        return None
    return [value if math.isfinite(value) else None for value in (interval.value, interval.low, interval.high)]


def _contrasts(differing: Sequence[Contrast]) -> Table:
    """The problems on which guidance changed the verdict, with every mode's answer."""
    variants = list(dict.fromkeys(variant for contrast in differing for variant in contrast.answers))
    rows = []
    for contrast in differing:
        answers = [contrast.answers.get(variant) for variant in variants]
        cells = ["" if sample is None else f"{sample.extracted} {'✓' if sample.right else '✗'}" for sample in answers]
        row = contrast.problem
        question = row.question if len(row.question) <= _EXCERPT else row.question[:_EXCERPT] + " …"
        rows.append((f"{row.task} {row.problem}", question, row.answer, *cells))
    header = ("problem", "question", "right", *(str(variant) for variant in variants))
    return Table("Where guidance changed the verdict", header, tuple(rows), ("The page shows the texts side by side.",))


def _table(table: Table) -> str:
    rows = [table.header, ("---", "---", *("---:" for _ in table.header[2:])), *table.rows]
    lines = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    return "\n\n".join((f"## {table.title}", "\n".join(lines), *table.notes))


def _cell(text: str) -> str:
    """The text on one line, with characters escaped that would end a cell or begin an HTML element."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run")
    try:
        found = write_report(parser.parse_args().run)
    except (RunError, UnreadableLine) as error:
        sys.exit(str(error))
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
