r"""A task's file: what is asked, how it is put, and who grades the answer. `docs/tasks.md` tells how to write one.

    name: math500
    data: {hub: {name: HuggingFaceH4/MATH-500, split: test}}
    columns: {id: unique_id, question: problem, answer: answer}
    prompt: "Solve ... within \\boxed{}.\n\nQuestion: {question}"
    grader: math

Shipped tasks lie in `cluster/jobs/tasks/` and are known by name; their data are loaded from the hub, never stored here.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StringConstraints,
    ValidationError,
    model_validator,
)

from cluster.demo.task import MAX_HOPS, Split
from cluster.jobs.grading import Grader

SHIPPED = Path(__file__).parent / "tasks"
QUESTION = "{question}"
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"

Name = Annotated[str, StringConstraints(pattern=_NAME, max_length=64)]
Column = Annotated[str, StringConstraints(min_length=1)]
Hops = Annotated[int, Field(ge=1, le=MAX_HOPS)]


class TaskError(ValueError):
    """A task or its data are wrong; the message names the key, file or row and what to do."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Hub(_Section):
    """A data set of the Hugging Face hub, as `datasets.load_dataset` names it."""

    name: str = Field(pattern=r"^([\w.-]+/)?[\w.-]+$")
    config: str | None = None
    split: str = Field("test", min_length=1)
    revision: str | None = None  # a branch, tag or commit


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, int) else value


class Demo(_Section):
    """Questions of the embedded multi-hop task: the first `n` of each hop count, those of `benchmarks.effect`."""

    hops: Annotated[tuple[Hops, ...], BeforeValidator(_several), Field(min_length=1)] = (2, 3, 4, 5)
    split: Split = "held_out"
    n: int = Field(100, ge=1)


class Data(_Section):
    """Where problems come from: exactly one of the three."""

    hub: Hub | None = None
    file: str | None = Field(None, min_length=1)  # JSONL; a relative path is relative to the task's file
    demo: Demo | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in ("hub", "file", "demo") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of hub, file and demo says where problems are, not {len(given)} of them")
        return self


class Columns(_Section):
    """Which column of a row holds what.

    wrong: columns of wrong options. With them the question is followed by all options, lettered in an order that a
    problem's id decides, and the answer is the letter of `answer`'s.
    """

    id: Column | None = None  # default: the row's number in the data, from 0
    question: Column = "question"
    answer: Column = "answer"
    wrong: tuple[Column, ...] = ()


class Task(_Section):
    """One task. Every default stands here.

    prompt: what is asked, with {question} in it once. style: "raw" gives every role this very text, as published;
    "chat" makes it a user's message in each role's own chat template. where: values that columns must have for a row
    to be a problem. samples: answers to each problem in a run. The rest are sampling parameters as a request has them.
    """

    name: Name
    data: Data
    columns: Columns = Columns()
    where: dict[Column, str | int | float | bool] = {}
    boxed_answer: bool = False  # the answer column holds a solution, whose last \boxed{} is the answer
    prompt: str = QUESTION
    style: Literal["raw", "chat"] = "chat"
    grader: Grader
    samples: int = Field(1, ge=1)
    max_tokens: int = Field(8_192, ge=1)
    temperature: float = Field(0.6, ge=0, le=100)
    top_p: float = Field(0.95, gt=0, le=1)
    stop: tuple[Annotated[str, StringConstraints(min_length=1)], ...] = ()
    stop_on_repeat: int = Field(0, ge=0)
    _folder: Path = PrivateAttr(default=Path())  # of the file that it was read from

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.prompt.count(QUESTION) != 1:
            raise ValueError(f"prompt must have {QUESTION} in it once, not {self.prompt.count(QUESTION)} times")
        if self.columns.wrong and (self.grader != "letter" or self.boxed_answer):
            raise ValueError("columns.wrong makes the answer a letter: it needs grader letter and no boxed_answer")
        if (self.grader == "multihop") != (self.data.demo is not None):
            raise ValueError("grader multihop grades the embedded task, data.demo, and nothing else does")
        if self.stop_on_repeat == 1:
            raise ValueError("stop_on_repeat must be 0, for never, or at least 2")
        return self

    @property
    def folder(self) -> Path:
        """What a relative path in it is relative to."""
        return self._folder


def shipped() -> list[str]:
    """The names of the shipped tasks."""
    return sorted(file.stem for file in SHIPPED.glob("*.yaml"))


def load_task(name_or_path: str) -> Task:
    """The shipped task of that name, or the task in that YAML file. Raises TaskError naming every key that is wrong."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        if name_or_path not in shipped():
            raise TaskError(_unknown(name_or_path))
        path = SHIPPED / f"{name_or_path}.yaml"
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} is not YAML: {error}") from None
    if not isinstance(fields, dict):
        raise TaskError(f"{path} is not a task: its top level is not a mapping")
    try:
        task = Task.model_validate(fields)
    except ValidationError as error:
        raise TaskError("\n".join(f"{path}: {_sentence(item)}" for item in error.errors())) from None
    task._folder = path.resolve().parent
    return task


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, shipped(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"shipped are {', '.join(shipped())};"
    return f"there is no task {name!r}: {hint} a task of your own is a path that ends in .yaml"


def _sentence(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"]) or "the task"
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(item["loc"][-1]), [*Task.model_fields, *Columns.model_fields], n=1)
        return f"{where}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    return f"{where}: {item['msg'].removeprefix('Value error, ')}"
