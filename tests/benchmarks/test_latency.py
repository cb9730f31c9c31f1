from __future__ import annotations

import pytest

from benchmarks.decode import Plan
from benchmarks.hosts import NoHosts, require_rights
from benchmarks.latency import run
from benchmarks.shapes import SHAPES


def test_a_slower_link_costs_what_its_round_trips_cost() -> None:
    try:
        require_rights()
    except NoHosts as error:
        pytest.skip(str(error))
    fast, slow = (point.result() for point in run(Plan(SHAPES["tiny"], (1,), tokens=8, rounds=1), [0, 30]))
    assert fast["round_trip_ms"] < 30 <= 60 <= slow["round_trip_ms"] < 90
    assert slow["steps_ms"] > 60  # a step crosses the link and comes back at least once
    assert slow["guided_plain_tps"] < fast["guided_plain_tps"]
