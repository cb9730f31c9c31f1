"""The job that makes preference pairs, from its file to the saved folder, with the embedded trio in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import load_from_disk
from rich.console import Console

from actors.api.generation import Role
from actors.config import ConfigError
from actors.replica.engine_thread import Engine
from cluster.demo.task import grade, questions
from cluster.jobs import preferences
from cluster.jobs.config import Evaluation
from cluster.jobs.connecting import Connection
from cluster.jobs.dpo.training import load_training
from cluster.jobs.dry_run import dry_run
from cluster.jobs.evaluate import evaluate
from cluster.jobs.pairs import pairs
from cluster.jobs.preferences import WrongPair, check_grades, load_preferences, prompted_problems
from cluster.jobs.results import Results, RunError
from cluster.jobs.workload import Workload, load_workload
from tests.support.local_backend import LocalBackend
from tests.support.local_ray import ROOT
from tests.support.local_service import local_service, trio_config

CONSOLE = Console(quiet=True)
CONFIGS = ROOT / "cluster" / "jobs" / "configs" / "dpo"


def config(folder: Path, **changed: Any) -> Path:
    """The file of a job on a few training questions."""
    task = {
        "name": "few",
        "data": {"demo": {"hops": [2, 3], "split": "train", "n": 20}},
        "grader": "multihop",
        "samples": 4,
        "max_tokens": 60,
    }
    (folder / "few.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    path = folder / "pairs.yaml"
    given = {"run": str(folder / "run"), "tasks": [str(folder / "few.yaml")], "pairs": {"validation": 0.4} | changed}
    path.write_text(yaml.safe_dump(given), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def sampled(trio_engines: Mapping[Role, Engine], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job's folder with complete samples, generated through replicas, sockets and a coordinator."""
    folder = tmp_path_factory.mktemp("sampled")
    evaluation, _ = load_preferences(config(folder))
    workload = load_workload(evaluation)

    async def generate() -> None:
        async with local_service(trio_config(), trio_engines) as local:
            await evaluate(workload, Connection(LocalBackend(local), trio_config()), evaluation.run, CONSOLE)

    asyncio.run(generate())
    return folder


@pytest.fixture(autouse=True)
def samples_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generate no samples: they are complete."""

    def sample(evaluation: Evaluation, console: Console, *, resume: bool = True) -> Workload:
        return load_workload(evaluation)

    monkeypatch.setattr(preferences, "sample", sample)


def test_every_chosen_answer_is_right_and_every_rejected_one_wrong(sampled: Path) -> None:
    evaluation, pairing = load_preferences(config(sampled))
    result = preferences.run(evaluation, pairing, CONSOLE)
    saved = load_from_disk(result["pairs"])
    asked = {f"{one.text}": one for hops in (2, 3) for one in questions("train", hops, 20)}
    found = [(split, row) for split, rows in saved.items() for row in rows]
    assert found
    for _, row in found:
        question = next(one for text, one in asked.items() if text in row["prompt"])
        assert grade(row["chosen"], question)
        assert not grade(row["rejected"], question)
        assert row["prompt"] == row["target_prompt"] == row["guider_base_prompt"], "one template"
        assert row["prompt"].endswith("<|im_start|>assistant\n")
    by_split = {split: {row["problem"] for row in rows} for split, rows in saved.items()}
    assert not by_split["train"] & by_split["validation"]
    assert {row["kind"] for _, row in found} == {"target_right", "guider_right"}


def test_a_new_pairing_replaces_the_folder_and_its_card(sampled: Path) -> None:
    evaluation, pairing = load_preferences(config(sampled))
    first = preferences.run(evaluation, pairing, CONSOLE)["counts"]
    evaluation, pairing = load_preferences(config(sampled, kinds=["guider_right"], most=6))
    second = preferences.run(evaluation, pairing, CONSOLE)
    assert set(first["train"]) == {"target_right", "guider_right"}
    assert set(second["counts"]["train"]) == {"guider_right"}
    card = (Path(second["pairs"]) / "README.md").read_text(encoding="utf-8")
    assert "| guider_right | 4 | 2 |" in card
    assert "target_right" not in card.split("```json")[0]


def test_without_pairs_the_message_says_what_to_change(sampled: Path) -> None:
    evaluation, pairing = load_preferences(config(sampled, min_chosen_tokens=1_000))
    with pytest.raises(RunError, match=r"no pairs for train and validation.*min_chosen_tokens"):
        preferences.run(evaluation, pairing, CONSOLE)


def test_a_pair_that_grades_otherwise_is_refused(sampled: Path) -> None:
    evaluation, pairing = load_preferences(config(sampled))
    workload = load_workload(evaluation)
    samples = list(Results(evaluation.run).samples())
    made = pairs(samples, prompted_problems(workload, trio_config()), pairing)
    pair = made["train"][0]
    made["train"][0] = replace(pair, chosen=pair.rejected)
    with pytest.raises(WrongPair, match="not right when it is graded again"):
        check_grades(made, workload)


def test_keys_that_do_not_belong_are_refused_by_name(tmp_path: Path) -> None:
    path = config(tmp_path, pears=1)
    with pytest.raises(ConfigError, match="pears: unknown key"):
        load_preferences(path)
    given = yaml.safe_load(config(tmp_path).read_text(encoding="utf-8")) | {"alpha": [1], "modes": ["guided"]}
    path.write_text(yaml.safe_dump(given), encoding="utf-8")
    with pytest.raises(ConfigError, match="modes, alpha: target and guider are sampled alone"):
        load_preferences(path)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*_pairs.yaml")), ids=lambda file: file.stem)
def test_every_shipped_job_resolves_without_a_download(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    evaluation, _ = load_preferences(file)
    assert dry_run(evaluation, CONSOLE)["arms"] == ["target", "guider"]


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*_training.yaml")), ids=lambda file: file.stem)
def test_every_shipped_training_uses_the_pairs_of_its_job(file: Path) -> None:
    training = load_training(file)
    evaluation, _ = load_preferences(file.with_name(file.name.replace("_training", "_pairs")))
    assert (training.pairs, training.service) == (evaluation.run / "pairs", evaluation.service)
