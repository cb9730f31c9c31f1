"""The least load at which a second coordinator pays."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from benchmarks.coordinators import Plan, Point, result, table
from benchmarks.shapes import SHAPES
from benchmarks.timed_engine import SIMULATION, TIMED_SHAPES


def measured(plan: Plan, gains: dict[int, float]) -> Sequence[Point]:
    """Points at which two coordinators gain given ratios, by load, in each of two rounds."""
    points = plan.points
    for point in points:
        gain = gains[point.sessions] if point.coordinators == 2 else 1.0
        for alone in (100.0, 200.0):
            point.rates.append(alone * gain)
            point.coordinator_busy.append(0.5)
            point.target_busy.append(0.75)
    return points


PLAN = Plan(SHAPES["trio"], sessions=64, coordinators=(1, 2, 4), sweep=(16, 64, 128, 256))


def test_points_that_both_parts_need_are_measured_once() -> None:
    points = [(point.sessions, point.coordinators) for point in PLAN.points]
    assert len(points) == len(set(points)) == 3 + 2 * 3


def test_a_second_coordinator_pays_from_its_first_lasting_gain() -> None:
    told = result(PLAN, measured(PLAN, {16: 1.5, 64: 0.9, 128: 1.1, 256: 1.2}))
    assert told["pays_from"] == 128
    assert [point["over_one"] for point in told["spread"]] == [1.0, 0.9, 1.0]
    assert told["sweep"][-1] == {
        "sessions": 256,
        "coordinators": 2,
        "tokens_per_s": 180.0,
        "coordinator_busy": 0.5,
        "target_busy": 0.75,
        "over_one": 1.2,
    }


def test_a_second_coordinator_that_never_gains_never_pays() -> None:
    assert result(PLAN, measured(PLAN, dict.fromkeys((16, 64, 128, 256), 1.01)))["pays_from"] is None


@pytest.mark.parametrize(("shape", "simulated"), [("trio", False), ("h200-7b", True)])
def test_figures_of_simulated_models_are_marked(shape: str, simulated: bool) -> None:
    plan = Plan((SHAPES | TIMED_SHAPES)[shape], sessions=16, coordinators=(1,), sweep=())
    points = measured(plan, {})
    shown = result(plan, points)
    assert (shown["shape"], shown["simulation"], shown["pays_from"]) == (shape, simulated, None)
    assert (SIMULATION in str(table(plan, points).title)) is simulated
