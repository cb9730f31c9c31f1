"""Runs an evaluation: tasks x modes x settings x seeds on the service. It can be resumed at any moment.

    python -m cluster.jobs.evaluate CONFIG.yaml [--run FOLDER] [--no-resume] [--dry-run]
    ray job submit --working-dir . -- python -m cluster.jobs.evaluate CONFIG.yaml --run /shared/FOLDER

It uses the service that runs in the cluster, or starts one from the config's `service` file. Every sample is stored
when it finishes: after Ctrl-C, `ray job stop` or a kill, the same command computes the missing ones. The last line of
output is one JSON object. Exit status: 0 finished; 1 an error, explained by the message; 130, 143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from actors.config import ConfigError
from actors.engine.errors import LoadError
from actors.preflight import load_tokenizers
from cluster.jobs.adapters import service_with
from cluster.jobs.client import Answer, Client, Item, Unanswered
from cluster.jobs.config import AS_CONFIGURED, Evaluation, load_evaluation
from cluster.jobs.connecting import Connection, connected, ready
from cluster.jobs.dry_run import dry_run
from cluster.jobs.evaluation_report import remove_report, write_report
from cluster.jobs.grading import grade
from cluster.jobs.jsonl import UnreadableLine
from cluster.jobs.math_process import GradingError
from cluster.jobs.progress import Progress
from cluster.jobs.reproduction import reproduced
from cluster.jobs.results import Results, RunError
from cluster.jobs.sample import Sample, Timing
from cluster.jobs.summary import summarise
from cluster.jobs.task_loading import TaskError
from cluster.jobs.workload import MAY_DIFFER, Workload, load_workload
from cluster.launch import LaunchError

STOPPING = (signal.SIGINT, signal.SIGTERM)
REFUSALS = (
    ConfigError,
    GradingError,
    LaunchError,
    LoadError,
    RunError,
    TaskError,
    Unanswered,
    UnreadableLine,
)  # errors whose message says what to do
COPIED = "working_dir_files"  # folder in which Ray keeps the copy of a submitted job's working directory

T = TypeVar("T")


class Stopped(Exception):
    """A signal asked the job to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


async def answer_all(items: Iterator[Item], client: Client, results: Results, progress: Progress, at_once: int) -> None:
    """Generate, grade and store every item, `at_once` at a time. Raises what `Client.answer_item` raises."""

    async def worker() -> None:
        for item in items:
            answer = await client.answer_item(item)
            sample = await asyncio.to_thread(graded, item, answer)
            usage = answer.usage
            timing = Timing(item.key, answer.seconds, usage.drafted_tokens, usage.accepted_tokens)
            results.append(sample, timing)
            progress.finished(item.arm, sample)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(worker())
    except* REFUSALS as errors:
        raise errors.exceptions[0] from None


def graded(item: Item, answer: Answer) -> Sample:
    """The answer of an item as a graded sample."""
    found = grade(item.task.grader, answer.text, item.problem.answer)
    usage = answer.usage
    return Sample(
        key=item.key,
        text=answer.text,
        extracted=found.extracted,
        right=found.right,
        finish=answer.end.reason,
        prompt_tokens=usage.prompt_tokens,
        tokens=usage.completion_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        guided_tokens=usage.guided_tokens,
        changed_tokens=usage.changed_tokens,
    )


async def evaluate(
    workload: Workload,
    connection: Connection,
    folder: Path,
    console: Console,
    *,
    adapter: str = AS_CONFIGURED,
    resume: bool = True,
) -> None:
    """Generate the samples of `adapter` that `folder` lacks, then sort the folder's files.

    The connected service must have that adapter. Raises ConfigError, RunError, Unanswered, LaunchError.
    """
    evaluation, service = workload.evaluation, connection.service
    coordinator = service.coordinator
    progress = Progress(console, workload.totals())
    client = Client(
        connection.backend, service, load_tokenizers(service), drafts=evaluation.drafts, on_tokens=progress.add_tokens
    )
    workload.check(client)
    first = next(iter(evaluation.adapters), AS_CONFIGURED)  # config.yaml holds the service with this one
    config, rows = workload.resolved(service_with(service, evaluation, first)), workload.problem_rows()
    with Results(folder).writing(config, rows, resume=resume, may_differ=MAY_DIFFER) as results:
        if not resume:
            remove_report(folder)
        arms = {(arm.mode, arm.setting): arm for arm in workload.arms}
        for sample in results.samples():
            progress.resumed(arms[sample.key.mode, sample.key.setting], sample)
        done = results.done()
        missing = (item for item in workload.items(adapter) if item.key not in done)
        await ready(connection.backend, service.deadlines.model_load_s, console.print)
        with progress:
            at_once = evaluation.concurrency or coordinator.max_sessions * coordinator.replicas.max
            await answer_all(missing, client, results, progress, at_once)
        results.finish()


async def until_stopped(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. A signal cancels it and raises Stopped."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    received: list[int] = []

    def stop(number: int) -> None:
        received.append(number)
        task.cancel()

    for number in STOPPING:
        loop.add_signal_handler(number, stop, number)
    try:
        return await task
    except asyncio.CancelledError:
        if not received:
            raise
        raise Stopped(received[0]) from None
    finally:
        for number in STOPPING:
            loop.remove_signal_handler(number)


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise Stopped in the main thread at a signal. Ray's own handlers are restored at the end."""

    def stop(number: int, _: object) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def require_lasting(run: Path) -> None:
    """Raise ConfigError for a run's folder that Ray would delete at the end of a submitted job."""
    if not run.is_absolute() and COPIED in Path.cwd().parts:
        raise ConfigError(
            f"run: {run} would lie in the job's copy of the working directory, which Ray deletes when the job ends: "
            "give the absolute path of a folder that stays (--run)"
        )


def sample(evaluation: Evaluation, console: Console, *, resume: bool = True) -> Workload:
    """Complete the samples in the evaluation's folder, with each adapter in turn. Returns their workload."""
    require_lasting(evaluation.run)
    workload = load_workload(evaluation)
    for adapter in evaluation.adapters or (AS_CONFIGURED,):
        adapted = None
        if adapter != AS_CONFIGURED:
            path = evaluation.adapters[adapter]
            console.print(f"the guider with {path or 'no adapter'} ({adapter})", highlight=False, soft_wrap=True)
            adapted = partial(service_with, evaluation=evaluation, adapter=adapter)
        with connected(evaluation.service, console.print, adapted) as connection:
            work = evaluate(workload, connection, evaluation.run, console, adapter=adapter, resume=resume)
            asyncio.run(until_stopped(work))
        resume = True  # the samples of the first adapter stay
    return workload


def run(evaluation: Evaluation, console: Console, *, resume: bool = True) -> dict[str, Any]:
    """Run the whole evaluation and write its report. Returns the JSON object of the last line."""
    sample(evaluation, console, resume=resume)
    result: dict[str, Any] = write_report(evaluation.run)
    if evaluation.expect is not None:
        result["reproduced"], words = reproduced(evaluation.expect, summarise(Results(evaluation.run)))
        console.print(words, highlight=False, soft_wrap=True)
    return result


def run_job(work: Callable[[], dict[str, Any]], console: Console) -> int:
    """Run a job's work and print its result as the last line of output, or print why it stopped.

    Returns the exit status, as of this module's command.
    """
    try:
        result = work()
    except REFUSALS as error:
        console.print("[bold red]error[/]", end=" ")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 1
    except (Stopped, KeyboardInterrupt) as stopped:
        console.print("stopped; finished work is stored, and the same command resumes it")
        return stopped.status if isinstance(stopped, Stopped) else 130
    print(json.dumps(result), flush=True)
    return 0


def sampling_options(description: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line of a job that samples: the config file and the folder of its results."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="the job's YAML file")
    parser.add_argument("--run", type=Path, help="the folder of the results; overrides `run` of the file")
    parser.add_argument("--no-resume", action="store_true", help="delete what the folder holds, and start over")
    parser.add_argument("--dry-run", action="store_true", help="only check every name and field; download nothing")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one evaluation, or only check it with --dry-run. Returns the exit status."""
    options, console = sampling_options(__doc__, arguments), Console(stderr=True)

    def work() -> dict[str, Any]:
        evaluation = load_evaluation(options.config).at(options.run)
        if options.dry_run:
            return dry_run(evaluation, console)
        return run(evaluation, console, resume=not options.no_resume)

    return run_job(work, console)


if __name__ == "__main__":
    sys.exit(main())
