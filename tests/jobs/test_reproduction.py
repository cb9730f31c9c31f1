"""The verdict on an expected gain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.jobs.config import Expectation
from cluster.jobs.reproduction import reproduced
from cluster.jobs.results import ProblemRow, Results
from cluster.jobs.sample import ALONE, Key, Mode, Sample, Timing
from cluster.jobs.summary import summarise

PROBLEMS = 40
EXPECTED = Expectation(setting="a1", gain=(0.1, 0.6), source="the paper")


def run(folder: Path, target: int, guided: int) -> Results:
    """A run in which the first `target` problems are right for the target, the first `guided` ones with guidance."""
    rows = [ProblemRow("t", f"{number:02}", "?", "!") for number in range(PROBLEMS)]
    arms: tuple[tuple[Mode, str, int], ...] = (("target", ALONE, target), ("guided", "a1", guided))
    config: dict[str, Any] = {"evaluation": {"seeds": [0]}, "tasks": {"t": {"samples": 1}}}
    with Results(folder).writing(config, rows) as results:
        for mode, setting, right in arms:
            for number, row in enumerate(rows):
                key = Key("t", row.problem, mode, setting, 0, 0)
                steered = int(mode == "guided")  # guided tokens: without any, a variant is not compared with the target
                sample = Sample(key, "text", "!", number < right, "stop", 1, 1, 0, steered, 0)
                results.append(sample, Timing(key, 1.0, 0, 0))
    return results


@pytest.mark.parametrize(
    ("target", "guided", "verdict", "why"),
    [
        (20, 28, True, "reproduced: a1 gains +40.0%"),
        (20, 21, False, "which may be chance"),  # +5 %, below the range too
        (20, 24, False, "which may be chance"),  # +20 %, within the range, but of four problems
        (20, 40, False, "not reproduced: a1 gains +100.0%"),  # significant, but not the published gain
        (28, 20, False, "not reproduced: a1 gains -28.6%"),
        (0, 20, False, "cannot be compared with the target"),  # no relative gain over zero
    ],
)
def test_a_gain_is_reproduced_if_significant_and_in_the_range(
    tmp_path: Path, target: int, guided: int, verdict: bool, why: str
) -> None:
    found, words = reproduced(EXPECTED, summarise(run(tmp_path, target, guided)))
    assert found is verdict
    assert why in words
    assert words.startswith("reproduced" if verdict else "not")
    assert "expected +10% to +60% (the paper)" in words
