"""The file of an evaluation: its arms, its errors, and the shipped files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from actors.api.generation import ROLES
from actors.api.guidance import Guidance
from actors.config import ConfigError
from cluster.estimate import memory_findings
from cluster.jobs.config import Evaluation, checked, load_evaluation
from cluster.jobs.dry_run import dry_run
from cluster.jobs.evaluate import main
from cluster.jobs.sample import ALONE
from cluster.jobs.workload import chosen_task, load_workload
from cluster.serve_file import read_service_config
from tests.support.published_trio import H100, H200, published_estimates

CONFIGS = sorted((Path(__file__).parents[2] / "cluster" / "jobs" / "configs").glob("*.yaml"))
MEMORY: dict[float, int] = {80: H100, 141: H200}  # bytes of a GPU, by the gigabytes that its name says


def evaluation(**keys: Any) -> Evaluation:
    return checked({"run": "runs/x", "tasks": ["multihop"]} | keys)


def test_settings_are_named_by_alpha_and_warm_up_or_schedule() -> None:
    made = evaluation(alpha=[0, 0.5], warmup_tokens=[0, 100], schedules={"fading": [[0, 1.5], [500, 0.5]]})
    assert made.settings() == {
        "a0": Guidance(0.0),
        "a0-w100": Guidance(0.0, 100),
        "a0.5": Guidance(0.5),
        "a0.5-w100": Guidance(0.5, 100),
        "fading": Guidance(schedule=((0, 1.5), (500, 0.5))),
    }


def test_only_the_guided_mode_runs_once_for_each_setting() -> None:
    arms = evaluation(alpha=[0.5, 1]).arms()
    assert [(arm.mode, arm.setting) for arm in arms] == [
        ("target", ALONE),
        ("guider", ALONE),
        ("guider_base", ALONE),
        ("guided", "a0.5"),
        ("guided", "a1"),
    ]
    assert all(arm.guidance.never_guides() for arm in arms if arm.mode != "guided")


def test_guider_and_guided_run_once_for_each_adapter() -> None:
    made = evaluation(modes=["target", "guider", "guided"], alpha=[0.5, 1], adapters={"plain": None, "dpo": "x"})
    assert [(str(arm), arm.adapter) for arm in made.arms()] == [
        ("target", "plain"),
        ("guider", "plain"),
        ("guided a0.5", "plain"),
        ("guided a1", "plain"),
        ("guider dpo", "dpo"),
        ("guided a0.5-dpo", "dpo"),
        ("guided a1-dpo", "dpo"),
    ]
    assert all(arm.guidance.never_guides() for arm in made.arms() if arm.mode != "guided")


def test_a_missing_adapter_is_named_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapters\.dpo: .* holds no adapter_model"):
        load_workload(evaluation(adapters={"dpo": str(tmp_path)}))


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"alhpa": [1]}, "alhpa: unknown key"),
        ({"tasks": [{"task": "aime2024", "limits": 3}]}, r"tasks\.0\.limits: unknown key"),
        ({"tasks": []}, "tasks: "),
        ({"modes": ["guided", "guided"]}, "modes repeats a value"),
        ({"alpha": []}, "needs an alpha or a schedule"),
        ({"alpha": [float("nan")]}, "finite"),
        ({"warmup_tokens": [-1]}, "warmup_tokens must be 0 or more"),
        ({"schedules": {"late": [[5, 1.0]]}}, r"schedules\.late must begin at token 0"),
        ({"schedules": {"a1": [[0, 1.0]]}}, "a1 is already the name of a setting"),
        ({"expect": {"setting": "a2", "gain": [0, 1], "source": "hope"}}, "the settings are a1"),
        ({"drafts": 9}, "drafts: "),
        ({"adapters": {"a": None, "b": None}}, "at most one may be null"),
        ({"adapters": {"a-b": "x"}}, r"adapters\.a-b"),
    ],
)
def test_wrong_keys_and_values_are_refused_by_name(keys: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        evaluation(**keys)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_shipped_config_resolves_without_a_download(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = dry_run(load_evaluation(file), Console(quiet=True))
    assert result["models"].keys() == set(ROLES)
    assert result["tasks"]
    assert any(arm.startswith("guided") for arm in result["arms"])


@pytest.mark.parametrize(
    "file", [file for file in CONFIGS if file.stem.startswith("paper")], ids=lambda file: file.stem
)
def test_the_papers_trio_fits_the_machine_that_its_config_names(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    made = load_evaluation(file)
    assert made.machine is not None
    service = read_service_config(made.service)
    estimates = published_estimates(service, tmp_path).values()
    assert sum(costs.gpus for costs in estimates) <= made.machine.gpus
    assert memory_findings([*estimates], [MEMORY[made.machine.gpu_memory_gb]]) == []
    longest = max(chosen_task(choice).max_tokens for choice in made.tasks)
    assert all(costs.cache_tokens > longest for costs in estimates)


def test_a_dry_run_names_every_missing_model_and_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    service = yaml.safe_load((Path(__file__).parents[2] / "ray_config.yaml").read_text(encoding="utf-8"))
    service["applications"][0]["args"]["models"]["guider"]["path"] = "/nowhere/guider"
    (tmp_path / "service.yaml").write_text(yaml.safe_dump(service), encoding="utf-8")
    config = {
        "run": str(tmp_path / "run"),
        "service": str(tmp_path / "service.yaml"),
        "tasks": ["aime2034", "multihop"],
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main([str(tmp_path / "config.yaml"), "--dry-run"]) == 1
    message = capsys.readouterr().err
    assert "aime2034" in message
    assert "/nowhere/guider" in message
    assert not (tmp_path / "run").exists()
