"""All samples that an evaluation generates, and the configuration that is stored beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from actors.api.generation import ROLES
from actors.config import ConfigError, ServiceConfig
from cluster.jobs.adapters import check_adapters, digests
from cluster.jobs.client import Client, Item
from cluster.jobs.config import AS_CONFIGURED, Arm, Evaluation, TaskChoice
from cluster.jobs.results import ProblemRow
from cluster.jobs.task_loading import Problem, Task, load_task, problems

# Keys that change no sample: a run may be resumed with other values of these.
_PLACEMENT = ("cache_tokens", "prefill_chunk", "num_cpus", "num_gpus", "resources", "label_selector", "replicas")
MAY_DIFFER = frozenset(
    [
        *(f"evaluation.{key}" for key in ("run", "service", "concurrency", "drafts", "data", "machine", "expect")),
        *(f"service.{key}" for key in ("name", "speculation", "coordinator", "router", "deadlines", "guidance")),
        *(f"service.models.{role}.{key}" for role in ROLES for key in _PLACEMENT),
    ]
)


@dataclass(frozen=True)
class Workload:
    """The tasks of an evaluation with their problems, in the order of the requests."""

    evaluation: Evaluation
    tasks: tuple[tuple[Task, tuple[Problem, ...]], ...]

    @property
    def arms(self) -> list[Arm]:
        """The modes and settings in which every problem is sampled."""
        return self.evaluation.arms()

    def items(self, adapter: str = AS_CONFIGURED) -> Iterator[Item]:
        """Every sample with that adapter, problem by problem: all arms advance together and prompts share prefill."""
        arms = [arm for arm in self.arms if arm.adapter == adapter]
        for task, asked in self.tasks:
            for problem in asked:
                for arm in arms:
                    for seed in self.evaluation.seeds:
                        for number in range(task.samples):
                            yield Item(task, problem, arm, seed, number)

    def totals(self) -> dict[Arm, int]:
        """Samples by arm."""
        each = sum(len(asked) * task.samples for task, asked in self.tasks) * len(self.evaluation.seeds)
        return dict.fromkeys(self.arms, each)

    def problem_rows(self) -> list[ProblemRow]:
        """Questions and right answers for the results."""
        return [
            ProblemRow(task.name, problem.id, problem.question, problem.answer)
            for task, asked in self.tasks
            for problem in asked
        ]

    def resolved(self, service: ServiceConfig) -> dict[str, Any]:
        """The configuration that the results store."""
        return {
            "evaluation": self.evaluation.model_dump(mode="json"),
            "tasks": {task.name: task.model_dump(mode="json") for task, _ in self.tasks},
            "service": service.model_dump(mode="json"),
            "adapters": digests(self.evaluation),
        }

    def check(self, client: Client) -> None:
        """Build the request of every problem in every mode. Raises ConfigError for the first that does not fit."""
        kinds = {(arm.mode, arm.guidance.never_guides()): arm for arm in self.arms}
        for task, asked in self.tasks:
            for problem in asked:
                for arm in kinds.values():
                    client.request(Item(task, problem, arm, self.evaluation.seeds[0], 0))


def chosen_task(choice: TaskChoice) -> Task:
    """The task of a choice, with the keys that the choice overrides. Raises TaskError."""
    changed = choice.model_dump(include={"samples", "max_tokens"}, exclude_none=True)
    task = load_task(choice.task)
    return task.model_copy(update=changed | {"where": task.where | choice.where})


def load_workload(evaluation: Evaluation) -> Workload:
    """The problems of every task. Raises TaskError for an unknown task, ConfigError for a repeated one or a missing
    adapter."""
    check_adapters(evaluation)
    loaded: list[tuple[Task, tuple[Problem, ...]]] = []
    for choice in evaluation.tasks:
        task = chosen_task(choice)
        if any(task.name == other.name for other, _ in loaded):
            raise ConfigError(f"tasks: {task.name} is repeated; give one task file another name")
        loaded.append((task, tuple(problems(task, limit=choice.limit, data_dir=evaluation.data))))
    return Workload(evaluation, tuple(loaded))
