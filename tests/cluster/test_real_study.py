"""The service and the evaluations of the real models: their files are sound, and their problems are the split's."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.jobs.config import load_evaluation
from cluster.jobs.workload import load_workload
from cluster.real import study
from cluster.real.make_problems import SIZES
from cluster.real.models import GEMMA3, SMOLLM2, RealModelError
from cluster.real.sums import Split
from cluster.serve_file import read_service_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "cluster/real/configs").glob("*.yaml"))


@pytest.fixture
def fetched_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders of both models, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = tmp_path / "thinklogit" / "real"
    for model in (SMOLLM2, GEMMA3):
        (root / model.name).mkdir(parents=True)
    return root


def test_the_written_service_is_one_that_the_launcher_reads(fetched_models: Path, tmp_path: Path) -> None:
    file, adapter = tmp_path / "runs" / "service.yaml", tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").touch()
    study.write_service(file, adapter)
    models = read_service_config(file).models
    assert models.target.path == str(fetched_models / GEMMA3.name)
    assert models.guider.path == models.guider_base.path == str(fetched_models / SMOLLM2.name)
    assert models.guider.adapter == str(adapter)
    assert models.guider_base.adapter is None


def test_a_service_without_its_models_says_how_to_fetch_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RealModelError, match=r"cluster\.real --fetch"):
        study.write_service(tmp_path / "service.yaml", tmp_path)


def test_a_service_without_its_adapter_says_how_to_train_one(fetched_models: Path, tmp_path: Path) -> None:
    with pytest.raises(RealModelError, match=r"cluster\.real\.train"):
        study.write_service(tmp_path / "service.yaml", tmp_path)
    assert not (tmp_path / "service.yaml").exists()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_evaluation_asks_problems_of_one_split(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    evaluation = load_evaluation(config)
    split: Split = "validation" if config.stem == "choose" else "test"
    for (task, asked), choice in zip(load_workload(evaluation).tasks, evaluation.tasks, strict=True):
        assert len(asked) == (choice.limit or SIZES[split])
        assert all(problem.id.startswith(f"{split}-") for problem in asked)
        assert task.max_tokens == 128
        assert task.style == "raw"
