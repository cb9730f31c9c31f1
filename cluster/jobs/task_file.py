r"""The YAML file of a task: data, prompt and grader. `docs/tasks.md` describes how to write one.

    name: math500
    data: {hub: {name: HuggingFaceH4/MATH-500, split: test}}
    columns: {id: unique_id, question: problem, answer: answer}
    prompt: "Solve ... within \\boxed{}.\n\nQuestion: {question}"
    grader: math

Shipped tasks are the files in `cluster/jobs/tasks/`, and have names. Their data are loaded from the hub and not stored
in this repository.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, StringConstraints, ValidationError, model_validator

from actors.config import ConfigError
from cluster.demo.task import MAX_HOPS, Split
from cluster.jobs.config import Section
from cluster.jobs.grading import Grader
from cluster.serve_file import read_mapping

SHIPPED = Path(__file__).parent / "tasks"
QUESTION = "{question}"
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"

Name = Annotated[str, StringConstraints(pattern=_NAME, max_length=64)]
Column = Annotated[str, StringConstraints(min_length=1)]
Hops = Annotated[int, Field(ge=1, le=MAX_HOPS)]


class TaskError(ValueError):
    """A task or its data are wrong. The message names the key, file or row and what to do."""


class Hub(Section):
    """A data set of the Hugging Face hub, with the arguments of `datasets.load_dataset`."""

    name: str = Field(pattern=r"^([\w.-]+/)?[\w.-]+$")
    config: str | None = None
    split: str = Field("test", min_length=1)
    revision: str | None = None  # a branch, tag or commit


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, int) else value


class Demo(Section):
    """Questions of the embedded multi-hop task: the first `n` of each hop count, as in `benchmarks.effect`."""

    hops: Annotated[tuple[Hops, ...], BeforeValidator(_several), Field(min_length=1)] = (2, 3, 4, 5)
    split: Split = "held_out"
    n: int = Field(100, ge=1)


class Data(Section):
    """The source of the problems: exactly one of the three."""

    hub: Hub | None = None
    file: str | None = Field(None, min_length=1)  # JSONL; a relative path is relative to the task's file
    demo: Demo | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in ("hub", "file", "demo") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of hub, file and demo must be given, not {len(given)} of them")
        return self


class Columns(Section):
    """The columns of a row.

    wrong: columns of wrong options. If given, all options follow the question, lettered in an order that depends on the
    problem's id, and the right answer is the letter of the option in column `answer`.
    """

    id: Column | None = None  # default: the row's number in the data, from 0
    question: Column = "question"
    answer: Column = "answer"
    wrong: tuple[Column, ...] = ()


class Task(Section):
    """One task, with the default of every key.

    prompt: the text of the prompt, with {question} in it once. style: "raw" sends this text to every role, as in the
    paper; "chat" sends it as a user's message in each role's own chat template. where: values that columns must have
    for a row to be a problem. samples: answers to each problem in a run. The others are sampling parameters.
    """

    name: Name
    data: Data
    columns: Columns = Columns()
    where: dict[Column, str | int | float | bool] = Field(default_factory=dict)
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
    _folder: Path = PrivateAttr(default=Path())  # of the task's file

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.prompt.count(QUESTION) != 1:
            raise ValueError(f"prompt must contain {QUESTION} once, not {self.prompt.count(QUESTION)} times")
        if self.columns.wrong and (self.grader != "letter" or self.boxed_answer):
            raise ValueError("columns.wrong makes the answer a letter: it needs grader letter and no boxed_answer")
        if (self.grader == "multihop") != (self.data.demo is not None):
            raise ValueError("grader multihop and data.demo, the embedded task, need each other")
        if self.stop_on_repeat == 1:
            raise ValueError("stop_on_repeat must be 0 (never) or at least 2")
        return self

    @property
    def folder(self) -> Path:
        """The folder that relative paths in the task are relative to."""
        return self._folder


def shipped() -> list[str]:
    """The names of the shipped tasks."""
    return sorted(file.stem for file in SHIPPED.glob("*.yaml"))


def load_task(name_or_path: str) -> Task:
    """The shipped task of that name, or the task in that YAML file. Raises TaskError naming every wrong key."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        if name_or_path not in shipped():
            raise TaskError(_unknown(name_or_path))
        path = SHIPPED / f"{name_or_path}.yaml"
    try:
        task = Task.model_validate(read_mapping(path))
    except ConfigError as error:
        raise TaskError(str(error)) from None
    except ValidationError as error:
        raise TaskError("\n".join(f"{path}: {_sentence(item)}" for item in error.errors())) from None
    task._folder = path.resolve().parent
    return task


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, shipped(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"the shipped tasks are {', '.join(shipped())};"
    return f"there is no task {name!r}: {hint} for your own task, give a path that ends in .yaml"


def _sentence(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"]) or "the task"
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(item["loc"][-1]), [*Task.model_fields, *Columns.model_fields], n=1)
        return f"{where}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    return f"{where}: {item['msg'].removeprefix('Value error, ')}"
