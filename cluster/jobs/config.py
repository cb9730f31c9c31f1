"""The YAML file of an evaluation: tasks x modes x settings of guidance x seeds.

run: runs/demo                # the folder of the results; the same command resumes an interrupted run
service: ray_config.yaml      # the service to start if none runs
tasks:
  - multihop                  # a shipped task's name, or the path of a task file
  - {task: math500, limit: 100, samples: 4, max_tokens: 8192}
modes: [target, guider, guider_base, guided]
alpha: [0.5, 1.0]             # x warmup_tokens: the settings of the guided mode
warmup_tokens: [0, 100]
schedules: {fading: [[0, 1.5], [500, 0.5]]}
adapters: {plain: null, dpo: runs/dpo/adapter}   # of the guider; the service is started with each in turn
seeds: [0, 1]
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from actors.api.guidance import Guidance
from actors.config import ConfigError
from cluster.jobs.sample import ALONE, MODES, Mode
from cluster.serve_file import read_mapping

UNGUIDED = Guidance(alpha=0.0)
AS_CONFIGURED = ""  # in place of an adapter's name: the service's own guider

S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """A section of a job's file. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskChoice(Section):
    """A task, and the keys of its file that this evaluation overrides. limit: use only the first problems.

    where: values of columns, required beside those of the task's own `where`.
    """

    task: str = Field(min_length=1)
    where: dict[str, str | int | float | bool] = Field(default_factory=dict)
    limit: int | None = Field(None, ge=1)
    samples: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)


class Machine(Section):
    """The machine that the evaluation needs. hours: shortest and longest duration, estimated unless measured."""

    gpus: int = Field(ge=0)
    gpu_memory_gb: float = Field(0.0, ge=0)
    hours: tuple[float, float]
    usd_per_gpu_hour: float = Field(0.0, ge=0)

    def __str__(self) -> str:
        low, high = self.hours
        gpus = f"{self.gpus} GPU{'s' * (self.gpus > 1)} of {self.gpu_memory_gb:g} GB" if self.gpus else "no GPU"
        cost = self.usd_per_gpu_hour * self.gpus
        return f"{gpus}, {low:g} to {high:g} h" + (f", {low * cost:.0f} to {high * cost:.0f} USD" if cost else "")


class Expectation(Section):
    """The result that counts as reproduced.

    The relative gain of `setting` over the target, averaged over the tasks, must lie within `gain` (0.1 is 10 %), and
    the interval of the paired difference above zero.
    """

    setting: str
    gain: tuple[float, float]
    source: str = Field(min_length=1)  # of the range


class Arm(NamedTuple):
    """A mode at a setting. Every problem is sampled in each arm."""

    mode: Mode
    setting: str
    guidance: Guidance
    adapter: str = AS_CONFIGURED  # a key of `adapters`

    def __str__(self) -> str:
        return self.mode if self.setting == ALONE else f"{self.mode} {self.setting}"


class Evaluation(Section):
    """An evaluation's file. `alpha` x `warmup_tokens` and `schedules` apply only to the guided mode, `adapters` to the
    guided mode and the guider's."""

    run: Path
    service: Path = Path("ray_config.yaml")
    tasks: tuple[TaskChoice, ...] = Field(min_length=1)
    modes: tuple[Mode, ...] = Field(MODES, min_length=1)
    alpha: tuple[float, ...] = (1.0,)
    warmup_tokens: tuple[int, ...] = Field((0,), min_length=1)
    schedules: dict[str, tuple[tuple[int, float], ...]] = {}  # each from token 0 on; warmup_tokens do not apply
    adapters: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+$")], str | None] = {}  # by name; null: none
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    concurrency: int | None = Field(None, ge=1)  # open requests; default: the sessions that the coordinators decode
    drafts: int | None = Field(None, ge=0, le=8)  # default: the service's configuration
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
                raise ValueError(f"{name} repeats a value")
        if "guided" in self.modes and not (self.alpha or self.schedules):
            raise ValueError("the guided mode needs an alpha or a schedule")
        for name, pieces in self.schedules.items():
            if not pieces or pieces[0][0] != 0:
                raise ValueError(f"schedules.{name} must begin at token 0")
        settings = [arm.setting for arm in self.arms() if arm.mode == "guided"]
        if len(set(settings)) < len(settings):
            raise ValueError("adapters: at most one may be null")
        if self.expect is not None and self.expect.setting not in settings:
            raise ValueError(f"expect.setting is {self.expect.setting!r}; the settings are {', '.join(settings)}")
        return self

    def settings(self) -> dict[str, Guidance]:
        """The settings of the guided mode by name: a1, a0.5-w100, or the name of a schedule."""
        made: dict[str, Guidance] = {}
        for alpha in self.alpha:
            for warmup in self.warmup_tokens:
                name = f"a{alpha:g}" + (f"-w{warmup}" if warmup else "")
                made[name] = Guidance(alpha, warmup)
        for name, pieces in self.schedules.items():
            if name in made or name == ALONE:
                raise ValueError(f"schedules.{name}: {name} is already the name of a setting")
            made[name] = Guidance(schedule=pieces)
        return made

    def arms(self) -> list[Arm]:
        """The modes in order: guided once for each setting; guided and guider once for each adapter.

        The name of an adapter that is not null is appended to that of the setting: a1-dpo.
        """
        settings = self.settings()
        arms = []
        for number, adapter in enumerate(self.adapters or (AS_CONFIGURED,)):
            named = adapter if self.adapters.get(adapter) is not None else ""
            for mode in self.modes:
                if mode == "guided":
                    names = {f"{name}-{named}" if named else name: guidance for name, guidance in settings.items()}
                elif mode == "guider" or number == 0:
                    names = {named if mode == "guider" and named else ALONE: UNGUIDED}
                else:
                    continue
                arms += [Arm(mode, name, guidance, adapter) for name, guidance in names.items()]
        return arms

    def at(self, run: Path | None) -> Self:
        """The same evaluation with its results in `run`; None: in its own folder."""
        return self if run is None else self.model_copy(update={"run": run})


def load_evaluation(path: Path) -> Evaluation:
    """The evaluation in a file. Raises ConfigError naming every wrong key."""
    return checked(read_mapping(path))


def checked(given: dict[str, Any]) -> Evaluation:
    """The evaluation in a mapping. Raises ConfigError naming every wrong key."""
    return validated(Evaluation, given)


def validated(kind: type[S], given: dict[str, Any]) -> S:
    """The mapping as a section of that kind. Raises ConfigError naming every wrong key."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(kind, item) for item in error.errors())) from None


def _sentence(kind: type[Section], item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        keys = f"; the keys are {', '.join(kind.model_fields)}" if len(item["loc"]) == 1 else ""
        return f"{where}: unknown key{keys}"
    message: str = item["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
