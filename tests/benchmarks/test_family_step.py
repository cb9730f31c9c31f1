from __future__ import annotations

import pytest

from benchmarks import family_step
from benchmarks.family_step import Steps, measure, table


async def test_both_families_are_measured_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family_step, "SESSIONS", (1, 3))
    monkeypatch.setattr(family_step, "STEPS", {1: 6, 3: 4})
    rounds: list[int] = []
    found = await measure(2, lambda: rounds.append(1))
    assert [steps.sessions for steps in found] == [1, 3]
    assert len(rounds) == 4
    assert all(len(took) == 2 and min(took) > 0 for steps in found for took in steps.took.values())
    assert table(found).row_count == 2


def test_the_difference_is_the_median_of_the_rounds() -> None:
    assert Steps(1, {"same": [1.0, 2.0, 3.0], "other": [2.0, 4.0, 9.0]}).result()["more_ms"] == 2.0
