from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import results_file as report


def test_the_result_is_the_last_line_and_saved_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    report.publish("speed", {"n": 1}, save=False)
    assert not list(tmp_path.iterdir())
    report.publish("speed", {"n": 2}, save=True, details=[{"case": "a"}])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"n": 2}
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text())
    assert file.name.startswith("speed-")
    assert kept["result"] == {"n": 2}
    assert kept["details"] == [{"case": "a"}]
    assert {"date", "versions", "hardware"} <= kept.keys()
