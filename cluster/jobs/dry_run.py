"""Checks an evaluation and shows what it would run, without downloading or starting anything."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from rich.console import Console
from rich.table import Table

from actors.api.generation import ROLES
from actors.config import ConfigError, ModelConfig, ServiceConfig
from cluster.jobs.adapters import check_adapters
from cluster.jobs.config import Evaluation
from cluster.jobs.task_loading import Task, TaskError, check_task
from cluster.jobs.workload import chosen_task
from cluster.serve_file import read_service_config

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def dry_run(evaluation: Evaluation, console: Console) -> dict[str, Any]:
    """Print tasks, models and arms. Returns the JSON object of the last line. Raises ConfigError with all errors."""
    wrong: list[str] = []
    tasks = _tasks(evaluation, wrong)
    models = _models(evaluation, wrong)
    try:
        check_adapters(evaluation)
    except ConfigError as error:
        wrong.append(str(error))
    if wrong:
        raise ConfigError("\n".join(wrong))
    arms = [str(arm) for arm in evaluation.arms()]
    table = Table("task", "problems", "samples a problem", "tokens at most", "grader", "prompt")
    for choice, task in zip(evaluation.tasks, tasks, strict=True):
        limit = "all" if choice.limit is None else f"the first {choice.limit}"
        samples = task.samples * len(evaluation.seeds)
        table.add_row(task.name, limit, str(samples), str(task.max_tokens), task.grader, task.style)
    console.print(table)
    for role, where in models.items():
        console.print(f"{role}: {where}", highlight=False, soft_wrap=True)
    console.print(f"every problem in {len(arms)} arms: {', '.join(arms)}", highlight=False, soft_wrap=True)
    if evaluation.machine is not None:
        console.print(f"needs {evaluation.machine}", highlight=False, soft_wrap=True)
    if evaluation.expect is not None:
        low, high = evaluation.expect.gain
        console.print(
            f"reproduced if {evaluation.expect.setting} gains {low:+.0%} to {high:+.0%} over the target, "
            f"significantly ({evaluation.expect.source})",
            highlight=False,
            soft_wrap=True,
        )
    return {"tasks": [task.name for task in tasks], "arms": arms, "models": models, "dry_run": True}


def _tasks(evaluation: Evaluation, wrong: list[str]) -> list[Task]:
    found: list[Task] = []
    for choice in evaluation.tasks:
        try:
            task = chosen_task(choice)
            check_task(task, evaluation.data)
        except TaskError as error:
            wrong += [f"tasks: {choice.task}: {line}" for line in str(error).splitlines()]
            continue
        if any(task.name == other.name for other in found):
            wrong.append(f"tasks: {task.name} is repeated; give one task file another name")
        found.append(task)
    return found


def _models(evaluation: Evaluation, wrong: list[str]) -> dict[str, str]:
    """Each role's model, and where its files are."""
    try:
        service: ServiceConfig = read_service_config(evaluation.service)
    except ConfigError as error:
        wrong += [f"service: {evaluation.service}: {line}" for line in str(error).splitlines()]
        return {}
    found: dict[str, str] = {}
    for role in ROLES:
        try:
            found[role] = _where(service.models.role(role))
        except ConfigError as error:
            wrong.append(f"service: models.{role}: {error}")
    return found


def _where(model: ModelConfig) -> str:
    if Path(model.path).expanduser().is_dir():
        return f"{model.path}, a local folder"
    if not _HUB_NAME.fullmatch(model.path):
        raise ConfigError(f"{model.path} is neither a local folder nor the name of a model on the hub")
    cached = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
    return f"{model.path}, {'in the cache' if isinstance(cached, str) else 'to be downloaded from the hub'}"
