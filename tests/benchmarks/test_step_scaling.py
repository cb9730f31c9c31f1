from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.plots import draw
from benchmarks.step_scaling import LEAST_CONTEXT, fit, result

SIZES = [1, 2, 4, 8, 16, 32, 64]


def test_the_fit_tells_linear_growth_from_quadratic() -> None:
    linear = fit(SIZES, [20 + 3 * n for n in SIZES])
    assert linear == {"constant_ms": 20, "linear_ms": 3, "quadratic_share": pytest.approx(0, abs=1e-6)}
    assert fit(SIZES, [20 + 3 * n + n * n for n in SIZES])["quadratic_share"] > 0.9


def test_results_of_every_kind_are_drawn(tmp_path: Path) -> None:
    points = {(n, LEAST_CONTEXT): 5.0 + n for n in (1, 2, 4)} | {(1, n): 6.0 + n for n in (512, 1024)}
    row = {"sessions": 1, "agreement": 0.8, "guided_over_target": 0.9, "guided_over_plain": 1.1, "acceptance": None}
    kept = {
        "scaling-laptop-cpu-2": result(points),
        "decode-laptop-cpu-2": row,
        "decode-laptop-sweep-cpu-2": [row, row | {"agreement": 0.9, "acceptance": 0.7}],
    }
    around = {"date": "2026-01-01T00:00:00", "hardware": {"processor": "a CPU", "cores": 2, "gpus": []}}
    for name, value in kept.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(around | {"result": value}))
    assert sorted(draw(tmp_path)) == sorted(f"{name}.json" for name in kept)
    assert (tmp_path / "plots.png").read_bytes()[:4] == b"\x89PNG"
