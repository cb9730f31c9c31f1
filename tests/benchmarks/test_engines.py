from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import engines
from benchmarks.engines import result, running, table
from tests.support.local_service import WEIGHTS


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    rounds = {"native": [2.0, 9.0, 4.0], "vllm": [1.0, 1.0, 4.0], "generate": [2.0, 1.0, 8.0]}
    assert result((8, 1), rounds) == {"sessions": 8, "tokens": 1, "vllm_over_generate": 0.5, "native_over_vllm": 2.0}
    del rounds["generate"]
    assert result((8, 5), rounds)["vllm_over_generate"] is None
    assert table("model", {(8, 5): rounds}).row_count == 1


@pytest.mark.slow
def test_a_worker_times_steps_of_the_native_engine(tmp_path: Path) -> None:
    with running("native", WEIGHTS / "guider", 2, 1, tmp_path) as worker:
        for sessions, tokens in ((1, 1), (2, 5)):
            took = worker.ask(sessions, tokens, 3)
            assert took is not None
            assert len(took) == 3
            assert min(took) > 0


@pytest.mark.slow
def test_a_worker_that_ends_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"native ended: .*no such"),
        running("native", tmp_path / "no such", 1, 1, tmp_path),
    ):
        pass


def test_without_vllm_the_message_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines, "VLLM_PYTHON", tmp_path / "python")
    assert engines.main([]) == 1
    assert "make venv-vllm" in capsys.readouterr().err
