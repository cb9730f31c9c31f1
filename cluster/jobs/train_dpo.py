"""Trains the guider on preference pairs (ThinkLogit-DPO). The result is a LoRA adapter for `models.guider.adapter`.

    python -m cluster.jobs.train_dpo CONFIG.yaml [--run FOLDER] [--no-resume]
    ray job submit --working-dir . -- python -m cluster.jobs.train_dpo CONFIG.yaml --run /shared/FOLDER

CONFIG.yaml (cluster/jobs/dpo/training.py has every key and its default):

run: runs/dpo
pairs: runs/preferences/pairs      # the output of cluster.jobs.preferences
service: ray_config.yaml           # the service whose guider is trained
workers: 4                         # each uses a GPU if the cluster has any

Ray Train runs the workers in the cluster, or in a local Ray that the job starts. A worker that dies is replaced, and
training resumes at the last checkpoint. So does the same command after Ctrl-C or a kill. The run's folder must be
visible to every node. It receives `adapter`, `metrics.jsonl`, `training.png` and `training.json`. If the guider already
has an adapter, the training begins at that one. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from actors.config import ConfigError, ModelConfig, ServiceConfig
from cluster.jobs.dpo.data import make_data
from cluster.jobs.dpo.journal import Journal, Line
from cluster.jobs.dpo.record import Record
from cluster.jobs.dpo.training import Training, load_training
from cluster.jobs.evaluate import require_lasting, run_job, stoppable
from cluster.jobs.results import RunError
from cluster.launch import join_ray, local_ray
from cluster.serve_file import read_service_config

POLL_S = 0.5
START_S = 60.0  # default of RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S


def main(arguments: Sequence[str] | None = None) -> int:
    """Train. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="the training's YAML file")
    parser.add_argument("--run", type=Path, help="the run's folder; overrides `run` of the file")
    parser.add_argument("--no-resume", action="store_true", help="delete what the folder holds, and start over")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)

    def work() -> dict[str, Any]:
        training = load_training(options.config)
        if options.run is not None:
            training = training.model_copy(update={"run": options.run})
        return train(training, console, resume=not options.no_resume)

    return run_job(work, console)


def train(training: Training, console: Console, *, resume: bool = True) -> dict[str, Any]:
    """Run or resume a training. Returns the JSON object of the last line. Raises ConfigError, RunError, LaunchError."""
    require_lasting(training.run)
    training = training.model_copy(update={"run": training.run.absolute(), "pairs": training.pairs.absolute()})
    service = read_service_config(training.service)
    if service.models.guider.adapter is not None and "lora" in training.model_fields_set:
        raise ConfigError(
            f"lora: the guider of {training.service} has an adapter, whose training is continued with its own rank and "
            "alpha: remove lora"
        )
    run = training.run
    if not resume:
        shutil.rmtree(run, ignore_errors=True)
    record = Record(run)
    record.open(training, service)
    if (result := record.result()) is not None:
        console.print(f"{run} is already finished; --no-resume starts it over", highlight=False)
        return result
    with _ray():
        counts = make_data(training, service, console)
        _fit(training, service, counts["train"], console)
    journal = Journal(run)
    console.print(f"plot: {journal.plot()}", highlight=False, soft_wrap=True)
    return record.finish(counts, journal.lines())


def _fit(training: Training, service: ServiceConfig, pairs: int, console: Console) -> None:
    """Run the workers to the end and show their metrics. Raises RunError if they die too often."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # a model's path may be relative to the working directory
    gpus = training.gpus
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"training": training, "guider": _placed(service.models.guider, gpus)},
        scaling_config=ScalingConfig(
            num_workers=training.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": training.cpus} | ({"GPU": gpus} if gpus else {}),
            label_selector=training.label_selector or None,
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(training.run / "ray"),
            failure_config=FailureConfig(
                max_failures=training.max_failures,
                # Each attempt waits START_S for the workers' resources; the cluster may have to start nodes first.
                controller_failure_limit=math.ceil(service.deadlines.model_load_s / START_S),
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    workers = f"{training.workers} workers, each with {training.cpus:g} CPUs and {gpus:g} GPUs"
    console.print(f"training: {workers}", highlight=False)
    with _progress_bar(Journal(training.run), training.steps(pairs), console):
        try:
            _run(trainer.fit)
        except TrainingFailedError as error:
            last = str(error).strip().splitlines()[-1]
            raise RunError(
                f"training ({workers}) failed: {last}; the same command resumes at the last checkpoint"
            ) from error


def _run(work: Callable[[], object]) -> None:
    """Do `work` in a thread, so that a signal stops the main thread with a message. Ray Train would end the process."""
    failed: list[BaseException] = []

    def guarded_work() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=guarded_work, daemon=True)
    with stoppable() if threading.current_thread() is threading.main_thread() else nullcontext():
        thread.start()
        while thread.is_alive():
            thread.join(POLL_S)
    if failed:
        raise failed[0]


def _worker(given: dict[str, Any]) -> None:
    """The training loop of one worker, from the newest checkpoint on."""
    import ray.train
    from ray.util.metrics import Gauge

    from cluster.jobs.dpo.fit import Job, fit

    gauges = {
        name: Gauge(f"thinklogit_training_{name}", f"{name} of preference training", tag_keys=("split",))
        for name in ("loss", "margin", "accuracy")
    }

    def on_line(line: Line) -> None:
        for name, gauge in gauges.items():
            gauge.set(getattr(line, name), {"split": line.split})

    def on_checkpoint(metrics: dict[str, float], folder: Path | None) -> None:
        checkpoint = None if folder is None else ray.train.Checkpoint.from_directory(str(folder))
        ray.train.report(metrics, checkpoint=checkpoint)

    job = Job(given["training"], given["guider"])
    latest = ray.train.get_checkpoint()
    if latest is None:
        fit(job, on_checkpoint, on_line)
        return
    with latest.as_directory() as folder:
        fit(job, on_checkpoint, on_line, Path(folder))


def _placed(guider: ModelConfig, gpus: float) -> ModelConfig:
    """The guider's configuration in a training worker: one device, no quantisation."""
    device, dtype = ("cuda", "bfloat16") if gpus else ("cpu", "float32")
    return guider.model_copy(update={"device": device, "dtype": dtype, "device_map": None, "quantization": None})


@contextmanager
def _ray() -> Iterator[None]:
    """The Ray that this process has joined, the cluster of the job, or a new local one."""
    if ray.is_initialized():
        yield
    elif join_ray():
        try:
            yield
        finally:
            ray.shutdown()
    else:
        with local_ray(max(2, os.cpu_count() or 2)):
            yield


@contextmanager
def _progress_bar(journal: Journal, steps: int, console: Console) -> Iterator[None]:
    """Show a progress bar that follows the journal, and a line for each validation."""
    text = TextColumn(
        "loss {task.fields[loss]:.3f} margin {task.fields[margin]:+.3f} right {task.fields[accuracy]:.0%}"
    )
    ended, seen = threading.Event(), len(journal.lines())
    with Progress(text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("steps", total=steps, loss=0.0, margin=0.0, accuracy=0.0)

        def follow() -> None:
            shown = seen
            while True:
                last = ended.wait(POLL_S)
                lines = journal.lines()
                for line in lines[min(shown, len(lines)) :]:
                    _show_line(bar, task, line)
                shown = len(lines)
                if last:
                    return

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _show_line(bar: Progress, task: TaskID, line: Line) -> None:
    if line.split == "train":
        bar.update(task, completed=line.step, loss=line.loss, margin=line.margin, accuracy=line.accuracy)
        return
    bar.console.print(
        f"step {line.step}: validation loss {line.loss:.4f}, reward margin {line.margin:+.3f}, "
        f"accuracy {line.accuracy:.1%}",
        highlight=False,
    )


if __name__ == "__main__":
    sys.exit(main())
