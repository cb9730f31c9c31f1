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
adapters: {plain: null, dpo: runs/dpo/adapter}   # of the guider: the service is brought up with each in turn
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
AS_CONFIGURED = ""  # in an adapter's place: the guider is as the service has it

S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """A part of a job's file: a key that is not known is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskChoice(Section):
    """A task, and what of it is run otherwise than its file says. limit: its first problems only."""

    task: str = Field(min_length=1)
    limit: int | None = Field(None, ge=1)
    samples: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)


class Machine(Section):
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


class Expectation(Section):
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
    adapter: str = AS_CONFIGURED  # a key of `adapters`

    def __str__(self) -> str:
        return self.mode if self.setting == ALONE else f"{self.mode} {self.setting}"


class Evaluation(Section):
    """An evaluation as its file says it. `alpha` x `warmup_tokens` and `schedules` apply to the guided mode alone,
    `adapters` to it and to the guider's."""

    run: Path
    service: Path = Path("ray_config.yaml")
    tasks: tuple[TaskChoice, ...] = Field(min_length=1)
    modes: tuple[Mode, ...] = Field(MODES, min_length=1)
    alpha: tuple[float, ...] = (1.0,)
    warmup_tokens: tuple[int, ...] = Field((0,), min_length=1)
    schedules: dict[str, tuple[tuple[int, float], ...]] = {}  # each from token 0 on; warmup_tokens do not apply
    adapters: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+$")], str | None] = {}  # by name; null: none
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
        settings = [arm.setting for arm in self.arms() if arm.mode == "guided"]
        if len(set(settings)) < len(settings):
            raise ValueError("adapters: at most one may be null")
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
        """Modes in their order; the guided one once for each setting, and what has the guider in it for each adapter.

        The name of an adapter that is not null follows that of the setting: a1-dpo.
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


def load_evaluation(path: Path) -> Evaluation:
    """The evaluation in a file. Raises ConfigError that names every key that is wrong."""
    return checked(read_mapping(path))


def checked(given: dict[str, Any]) -> Evaluation:
    """The evaluation of such a mapping. Raises ConfigError."""
    return validated(Evaluation, given)


def validated(kind: type[S], given: dict[str, Any]) -> S:
    """What a mapping says, as that kind of job. Raises ConfigError that names every key that is wrong."""
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
