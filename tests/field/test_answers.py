r"""Answers as models write them, each with the grade that it deserves.

A line of `answers.jsonl` has a `grader`, the right answer (`gold`), the content of a \boxed{} (`boxed`) or a whole
reply (`text`), and `right`. A new report of a wrong grade becomes a line.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.jobs.grading import GRADERS, Grader, grade

TABLE = Path(__file__).with_name("answers.jsonl")
ROWS: list[dict[str, Any]] = [json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]


def reply(row: dict[str, Any]) -> str:
    return row["text"] if "text" in row else rf"So it must be $\boxed{{{row['boxed']}}}$."


@pytest.mark.parametrize("grader", sorted(set(GRADERS) - {"multihop"}))
def test_every_reported_answer_gets_the_grade_that_it_deserves(grader: Grader) -> None:
    rows = [row for row in ROWS if row["grader"] == grader]
    with ThreadPoolExecutor(2) as pool:
        verdicts = list(pool.map(lambda row: grade(grader, reply(row), row["gold"]).right, rows))
    assert [row for row, right in zip(rows, verdicts, strict=True) if right != row["right"]] == []


def test_every_line_has_one_known_grader_and_one_reply() -> None:
    assert {row["grader"] for row in ROWS} <= set(GRADERS)
    assert [row for row in ROWS if ("text" in row) == ("boxed" in row) or not isinstance(row["right"], bool)] == []
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    assert len(set(lines)) == len(lines), "a line is repeated"
