"""What an evaluation runs: tasks x modes x settings of guidance x seeds, as one YAML file says it.

run: runs/demo                # the folder of the results; the same command goes on where it was interrupted
service: ray_config.yaml      # what to bring up where no service runs
tasks:
  - multihop                  # a shipped task's name, or the path of a task file
  - {task: math500, limit: 100, samples: 4, max_tokens: 8192}
modes: [target, guider, guider_base, guided]
alpha: [0.5, 1.0]             # x warmup_tokens: the settings of the guided mode
warmup_tokens: [0, 100]
schedules: {fading: [[0, 1.5], [500, 0.5]]}
seeds: [0, 1]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from actors.config import ConfigError
from actors.decoding.guidance import Guidance
from cluster.jobs.sample import ALONE, MODES, Mode
from cluster.serve_file import read_mapping

UNGUIDED = Guidance(alpha=0.0)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskChoice(_Section):
    """A task, and what of it is run otherwise than its file says. limit: its first problems only."""

    task: str = Field(min_length=1)
    limit: int | None = Field(None, ge=1)
    samples: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)


class Machine(_Section):
    """What the evaluation needs, and takes there. hours: at least and at most, estimated where nobody measured."""

    gpus: int = Field(ge=0)
    gpu_memory_gb: float = Field(0.0, ge=0)
    hours: tuple[float, float]
    usd_per_gpu_hour: float = Field(0.0, ge=0)

    def __str__(self) -> str:
        low, high = self.hours
        gpus = f"{self.gpus} GPU{'s' * (self.gpus > 1)} of {self.gpu_memory_gb:g} GB" if self.gpus else "no GPU"
        cost = self.usd_per_gpu_hour * self.gpus
        return f"{gpus}, {low:g} to {high:g} h" + (f", {low * cost:.0f} to {high * cost:.0f} USD" if cost else "")


class Expectation(_Section):
    """What counts as reproduced: the relative gain of `setting` over the target, averaged over the tasks, lies within
    `gain` (0.1 is 10 %), and the interval of the paired difference lies above zero."""

    setting: str
    gain: tuple[float, float]
    source: str = Field(min_length=1)  # where the range comes from


class Arm(NamedTuple):
    """A mode at a setting: what every problem is asked in."""

    mode: Mode
    setting: str
    guidance: Guidance

    def __str__(self) -> str:
        return self.mode if self.setting == ALONE else f"{self.mode} {self.setting}"


class Evaluation(_Section):
    """An evaluation as its file says it. `alpha` x `warmup_tokens` and `schedules` apply to the guided mode alone."""

    run: Path
    service: Path = Path("ray_config.yaml")
    tasks: tuple[TaskChoice, ...] = Field(min_length=1)
    modes: tuple[Mode, ...] = Field(MODES, min_length=1)
    alpha: tuple[float, ...] = (1.0,)
    warmup_tokens: tuple[int, ...] = Field((0,), min_length=1)
    schedules: dict[str, tuple[tuple[int, float], ...]] = {}  # each from token 0 on; warmup_tokens do not apply
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    concurrency: int | None = Field(None, ge=1)  # asked at once; default: what the coordinators decode together
    drafts: int | None = Field(None, ge=0, le=8)  # default: as the service is configured
    data: Path | None = None  # a folder with copies of the tasks' data; default: the hub
    machine: Machine | None = None
    expect: Expectation | None = None

    @field_validator("tasks", mode="before")
    @classmethod
    def _named(cls, tasks: Any) -> Any:
        return [{"task": task} if isinstance(task, str) else task for task in tasks] if tasks else tasks

    @model_validator(mode="after")
    def _sound(self) -> Self:
        lists: tuple[tuple[str, tuple[Any, ...]], ...] = (
            ("modes", self.modes),
            ("alpha", self.alpha),
            ("warmup_tokens", self.warmup_tokens),
            ("seeds", self.seeds),
        )
        for name, values in lists:
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names something twice")
        if "guided" in self.modes and not (self.alpha or self.schedules):
            raise ValueError("the guided mode needs an alpha or a schedule")
        for name, pieces in self.schedules.items():
            if not pieces or pieces[0][0] != 0:
                raise ValueError(f"schedules.{name} must begin at token 0")
        settings = self.settings()
        if self.expect is not None and self.expect.setting not in settings:
            raise ValueError(f"expect.setting is {self.expect.setting!r}; the settings are {', '.join(settings)}")
        return self

    def settings(self) -> dict[str, Guidance]:
        """Every setting of the guided mode by its name: a1, a0.5-w100, or its schedule's."""
        made: dict[str, Guidance] = {}
        for alpha in self.alpha:
            for warmup in self.warmup_tokens:
                name = f"a{alpha:g}" + (f"-w{warmup}" if warmup else "")
                made[name] = Guidance(alpha, warmup)
        for name, pieces in self.schedules.items():
            if name in made or name == ALONE:
                raise ValueError(f"schedules.{name}: {name} is a setting's name already")
            made[name] = Guidance(schedule=pieces)
        return made

    def arms(self) -> list[Arm]:
        """Modes in their order; the guided one once for each setting."""
        settings = self.settings()
        return [
            Arm(mode, name, guidance)
            for mode in self.modes
            for name, guidance in (settings.items() if mode == "guided" else [(ALONE, UNGUIDED)])
        ]


def load_evaluation(path: Path) -> Evaluation:
    """The evaluation in a file. Raises ConfigError that names every key that is wrong."""
    return checked(read_mapping(path))


def checked(given: dict[str, Any]) -> Evaluation:
    """The evaluation of such a mapping. Raises ConfigError."""
    try:
        return Evaluation.model_validate(given)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(item) for item in error.errors())) from None


def _sentence(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown key; the keys are {', '.join(Evaluation.model_fields)}"
    message: str = item["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
