"""The service and the evaluations of the real models: their files are sound, and their problems are the split's."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from actors.api.generation import ROLES
from cluster.jobs.config import load_evaluation
from cluster.jobs.jsonl import rows
from cluster.jobs.workload import load_workload
from cluster.real import __main__ as command
from cluster.real import study
from cluster.real.make_problems import SIZES
from cluster.real.models import ADAPTER, GEMMA3, SMOLLM2, RealModelError
from cluster.real.sums import Split
from cluster.serve_file import read_service_config

ROOT = Path(__file__).parents[2]
ADAPTERS = sorted(path.parent for path in (ROOT / "cluster/real/adapters").glob("*/adapter_config.json"))
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
    study.write_service(file, adapter, "native")
    models = read_service_config(file).models
    assert {models.role(role).engine for role in ROLES} == {"native"}
    assert models.target.path == str(fetched_models / GEMMA3.name)
    assert models.guider.path == models.guider_base.path == str(fetched_models / SMOLLM2.name)
    assert models.guider.adapter == str(adapter)
    assert models.guider_base.adapter is None


def test_the_committed_adapter_is_the_guiders_unless_another_is_given(fetched_models: Path, tmp_path: Path) -> None:
    study.write_service(tmp_path / "service.yaml")
    assert read_service_config(tmp_path / "service.yaml").models.guider.adapter == str(ADAPTER)


@pytest.mark.parametrize("folder", ADAPTERS, ids=lambda path: path.name)
def test_every_committed_adapter_is_small_safe_and_complete(folder: Path) -> None:
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] == SMOLLM2.name
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "curve.jsonl",
    }
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6 * 2**20
    weights = load_file(folder / "adapter_model.safetensors")
    assert all(weight.dtype == np.float16 and np.isfinite(weight).all() for weight in weights.values())
    assert all(weight.any() for name, weight in weights.items() if "lora_B" in name), "every layer was trained"
    curve = list(rows(folder / "curve.jsonl"))
    assert [line["step"] for line in curve] == list(range(1, len(curve) + 1))
    assert f"| `{folder.name}` |" in (folder.parent / "README.md").read_text(encoding="utf-8")


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
    split: Split = "test" if config.stem in ("main", "short") else "validation"
    for (task, asked), choice in zip(load_workload(evaluation).tasks, evaluation.tasks, strict=True):
        assert len(asked) == (choice.limit or SIZES[split])
        assert all(problem.id.startswith(f"{split}-") for problem in asked)
        assert task.max_tokens == 128
        assert task.style == "raw"


def test_the_comparison_of_guiders_names_every_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    evaluation = load_evaluation(ROOT / "cluster/real/configs/dpo/evaluation.yaml")
    assert {Path(path) for path in evaluation.adapters.values() if path} == {
        *(folder.relative_to(ROOT) for folder in ADAPTERS),
        Path("runs/real/dpo/adapter"),
    }


def test_the_short_evaluation_uses_a_service_file_that_it_writes(
    fetched_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran: list[Any] = []

    def run(evaluation: Any, console: Console) -> dict[str, Any]:
        ran.append(evaluation)
        return {"run": "short"}

    monkeypatch.setattr(study, "run", run)
    console = Console(file=io.StringIO())
    assert study.evaluate_shortly(console) == {"run": "short"}
    assert read_service_config(ran[0].service).models.guider.adapter == str(ADAPTER)
    study.evaluate_shortly(console, "vllm")
    assert read_service_config(ran[1].service).models.guider.engine == "vllm"
    assert [evaluation.run.name for evaluation in ran] == ["short", "short-vllm"]


def test_an_evaluation_without_the_models_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert command.main(["--evaluate"]) == 1
    assert "--fetch brings it" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["--adapter", "somewhere"])
    assert "--adapter needs --service" in capsys.readouterr().err
