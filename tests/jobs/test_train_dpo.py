"""Preference training of the embedded trio's guider: its effect, its files, and recovery from kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import yaml
from datasets import Dataset, DatasetDict
from rich.console import Console

from actors.config import ConfigError
from benchmarks.effect import ADAPTER
from cluster.demo.task import PEOPLE, Question, questions
from cluster.demo.tokenizer import MARKUP
from cluster.jobs.dpo.journal import FILE, PLOT, Journal
from cluster.jobs.dpo.record import RECORD
from cluster.jobs.dpo.training import Training
from cluster.jobs.results import RunError
from cluster.jobs.train_dpo import train
from tests.support.local_ray import READY_S, actors, trio_args, wait_until

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("shared_ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
]

STEPS = 12
BATCH = 8


def row(question: Question, number: int) -> dict[str, Any]:
    """A pair of a reasoned right answer and a bare wrong one."""
    wrong = next(name for name in PEOPLE[number % 7 :] if name != question.answer)
    prompts = {name: MARKUP.prompt(question) for name in ("prompt", "target_prompt", "guider_base_prompt")}
    return prompts | {
        "chosen": question.reasoned_answer,
        "rejected": f"The answer is {wrong}.",
        "chosen_finished": True,
        "rejected_finished": number % 4 > 0,
        "kind": "guider_right" if number % 2 else "target_right",
    }


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved dataset of pairs."""
    folder = tmp_path_factory.mktemp("pairs") / "pairs"
    asked = questions("train", 2, BATCH * STEPS + 16)
    rows = [row(question, number) for number, question in enumerate(asked)]
    splits = {"train": rows[16:], "validation": rows[:16]}
    DatasetDict({split: Dataset.from_list(some) for split, some in splits.items()}).save_to_disk(str(folder))
    return folder


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trio's Serve file."""
    application = {"name": "thinklogit", "import_path": "router.app:build", "args": trio_args()}
    path = tmp_path_factory.mktemp("service") / "service.yaml"
    path.write_text(yaml.safe_dump({"applications": [application]}), encoding="utf-8")
    return path


@pytest.fixture
def training(pairs: Path, service: Path, tmp_path: Path) -> Training:
    """A short run in one worker."""
    return Training(
        run=tmp_path / "run",
        pairs=pairs,
        service=service,
        learning_rate=1e-3,
        batch=BATCH,
        micro_batch=BATCH,
        every=4,
        lora={"rank": 8, "alpha": 8},
        gradient_checkpointing=False,
        gpus=0,
        cpus=0.5,
    )


def trained(training: Training, **changed: Any) -> dict[str, Any]:
    return train(training.model_copy(update=changed), Console(quiet=True))


def losses(run: Path, split: str = "validation") -> dict[int, float]:
    return {line.step: line.loss for line in Journal(run).lines() if line.split == split}


def accuracies(run: Path) -> list[float]:
    return [line.accuracy for line in Journal(run).lines() if line.split == "validation"]


@pytest.fixture(scope="module")
def uninterrupted(pairs: Path, service: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of the short run without interruptions."""
    make = training.__wrapped__  # type: ignore[attr-defined]
    return trained(make(pairs, service, tmp_path_factory.mktemp("uninterrupted")))


def test_guider_learns_to_prefer_the_chosen_answers(uninterrupted: dict[str, Any]) -> None:
    run = Path(uninterrupted["adapter"]).parent
    before, after = losses(run)[4], losses(run)[STEPS]
    assert after < before < 0.6931, "the loss begins at ln 2"
    assert uninterrupted["validation"]["accuracy"] > 0.8
    assert uninterrupted["pairs"] == {"train": BATCH * STEPS, "validation": 16}
    assert uninterrupted["steps"] == STEPS


def test_adapter_changes_every_linear_layer_and_nothing_else(uninterrupted: dict[str, Any]) -> None:
    from actors.engine.loader import ModelSource, load_model

    path = trio_args()["models"]["guider"]["path"]
    plain, adapted = (load_model(ModelSource(path, adapter=each)).model for each in (None, uninterrupted["adapter"]))
    changed = [name for name, weight in adapted.named_parameters() if (weight != plain.get_parameter(name)).any()]
    linears = [name for name, _ in plain.named_parameters() if name.endswith("proj.weight")]
    assert sorted(changed) == sorted(linears), "every linear layer, and nothing else"


def test_run_leaves_its_journal_its_plot_and_its_record(uninterrupted: dict[str, Any]) -> None:
    run = Path(uninterrupted["adapter"]).parent
    lines = Journal(run).lines()
    assert [line.step for line in lines if line.split == "validation"] == [4, 8, 12]
    assert [line.step for line in lines if line.split == "train"] == list(range(1, STEPS + 1))
    assert (run / PLOT).stat().st_size > 10_000
    assert json.loads((run / RECORD).read_text(encoding="utf-8"))["result"] == uninterrupted


@pytest.mark.slow
def test_killed_worker_changes_no_result(training: Training, uninterrupted: dict[str, Any], tmp_path: Path) -> None:
    def kill_once() -> None:
        wait_until(lambda: 4 in losses(training.run), "the first validation")
        wait_until(lambda: 5 in losses(training.run, "train"), "the step after it", poll_s=0.01)
        for worker in actors("RayTrainWorker"):
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
            killed.append(worker.pid)

    killed: list[int] = []
    killer = threading.Thread(target=kill_once)
    killer.start()
    result = trained(training)
    killer.join(READY_S)
    assert killed, "a worker was killed in the middle"
    assert result["validation"]["loss"] == pytest.approx(uninterrupted["validation"]["loss"], rel=0.01)
    assert losses(training.run).keys() == {4, 8, 12}, "repeated steps have one line each"


@pytest.mark.slow
def test_stopped_job_continues_from_its_checkpoint(
    training: Training, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "training.yaml"
    path.write_text(yaml.safe_dump(training.model_dump(mode="json")), encoding="utf-8")
    job = subprocess.Popen(
        [sys.executable, "-m", "cluster.jobs.train_dpo", str(path)],
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_until(lambda: 5 in losses(training.run, "train") or job.poll() is not None, "the fifth step")
        job.send_signal(signal.SIGTERM)
        output, _ = job.communicate(timeout=READY_S)
    finally:
        job.kill()
    assert job.returncode == 128 + signal.SIGTERM, output
    assert "finished work is stored" in output
    result = trained(training)
    assert result["validation"] == pytest.approx(uninterrupted["validation"], rel=0.01)
    assert losses(training.run).keys() == {4, 8, 12}


@pytest.mark.slow
def test_finished_run_is_kept_and_another_training_refused(training: Training) -> None:
    first = trained(training, epochs=0.25)
    ends = [line.step for line in Journal(training.run).lines() if line.split == "validation"]
    assert ends == [first["steps"]] == [3], "a run that ends between two validations ends with one"
    stamp = (training.run / FILE).stat().st_mtime_ns
    assert trained(training, epochs=0.25, workers=1) == first
    assert (training.run / FILE).stat().st_mtime_ns == stamp
    with pytest.raises(RunError, match=r"training\.beta.*--no-resume"):
        trained(training, epochs=0.25, beta=0.3)


@pytest.mark.slow
def test_guided_objective_prefers_the_chosen_answers(training: Training) -> None:
    result = trained(training, objective="guided", slice_width=16, gradient_checkpointing=True)
    assert losses(training.run)[STEPS] < losses(training.run)[4] < 0.6931
    assert result["validation"]["accuracy"] > 0.8


@pytest.mark.slow
def test_two_workers_take_the_same_steps_as_one(training: Training, uninterrupted: dict[str, Any]) -> None:
    result = trained(training, workers=2, micro_batch=BATCH // 2)
    assert result["steps"] == STEPS
    assert result["validation"]["loss"] == pytest.approx(uninterrupted["validation"]["loss"], rel=0.05)


@pytest.mark.slow
def test_supervised_tuning_raises_the_chosen_answers(training: Training) -> None:
    trained(training, loss="sft")
    assert losses(training.run)[STEPS] < losses(training.run)[4]


def test_missing_pairs_are_named_with_the_job_that_makes_them(training: Training, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pairs: .*nothing.*cluster\.jobs\.preferences"):
        trained(training, pairs=tmp_path / "nothing")


@pytest.fixture
def adapted(training: Training, tmp_path: Path) -> Training:
    """The same run for a guider that has an adapter."""
    given = yaml.safe_load(training.service.read_text(encoding="utf-8"))
    given["applications"][0]["args"]["models"]["guider"]["adapter"] = str(ADAPTER)
    path = tmp_path / "adapted.yaml"
    path.write_text(yaml.safe_dump(given), encoding="utf-8")
    return Training(**training.model_dump(exclude={"lora", "service"}), service=path)


def test_an_adapter_is_trained_on_from_where_it_was(adapted: Training, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    from cluster.jobs.dpo.fit import Job, fit
    from cluster.serve_file import read_service_config

    run = Path(trained(adapted)["adapter"]).parent
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (ADAPTER, run / "adapter"))
    assert {name: weight.shape for name, weight in after.items()} == {n: weight.shape for n, weight in before.items()}
    first, *_, last = (line.loss for line in Journal(run).lines())
    assert first == pytest.approx(0.6931, abs=1e-3), "the reference is the guider with its adapter"
    assert last < first
    moved, size = (
        sum(float((weight.astype(float) ** 2).sum()) for weight in weights)
        for weights in ([after[name] - before[name] for name in before], list(before.values()))
    )
    assert 0 < moved < size / 4, "it began at the adapter"

    resumed = adapted.model_copy(update={"run": tmp_path / "resumed"})
    shutil.copytree(run / "data", resumed.run / "data")
    checkpoint = min((run / "ray" / "train").glob("checkpoint_*"))
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] < STEPS
    guider = read_service_config(adapted.service).models.guider
    fit(Job(resumed, guider.model_copy(update={"device": "cpu"})), lambda metrics, folder: None, resume=checkpoint)
    again = load_file(resumed.run / "adapter" / "adapter_model.safetensors")
    assert all(np.allclose(again[name], after[name], atol=1e-5) for name in after), "a resumed training ends alike"


def test_the_shape_of_an_adapter_that_is_there_cannot_be_chosen(training: Training, adapted: Training) -> None:
    with pytest.raises(ConfigError, match="remove lora"):
        trained(training, service=adapted.service)


@pytest.mark.slow
def test_missing_resource_is_awaited_no_longer_than_configured(training: Training, tmp_path: Path) -> None:
    given = yaml.safe_load(training.service.read_text(encoding="utf-8"))
    args = given["applications"][0]["args"]
    args["models"]["target"]["resources"] = {"unicorn": 1}
    args["deadlines"] = {"model_load_s": 2}
    path = tmp_path / "unicorn.yaml"
    path.write_text(yaml.safe_dump(given), encoding="utf-8")
    with pytest.raises(RunError, match=r"no answers were scored for 2 s: the target needs .*unicorn"):
        trained(training, service=path, objective="guided")
