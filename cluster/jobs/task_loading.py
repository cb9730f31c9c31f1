"""Loads the problems of a task: turns the rows of its data into prompts and right ("gold") answers."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from math import isfinite
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from cluster.demo.task import questions
from cluster.jobs.grading import last_box, unanswerable
from cluster.jobs.jsonl import UnreadableLine, numbered_rows
from cluster.jobs.task_file import QUESTION, Columns, Demo, Hub, Task, TaskError, load_task, shipped

__all__ = ["Problem", "Task", "TaskError", "check_task", "load_task", "problems", "shipped"]

_LETTERED = re.compile(r"^\s*\(?([A-Z])[.):]\s", re.MULTILINE)  # the options in a question
COPY = Columns(id="id", question="problem", answer="answer")  # columns of a local copy of hub data


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem. prompt: the text that is sent, or the user's message if the task's style is chat."""

    id: str
    question: str
    answer: str  # the right answer, in the form that the task's grader reads
    prompt: str


def problems(task: Task, limit: int | None = None, data_dir: str | Path | None = None) -> list[Problem]:
    """The first `limit` problems of `task` (default: all), in the order of its data.

    Hub data are downloaded into the hub's cache, unless the folder `data_dir` holds a copy: `<task name>.jsonl` with
    rows of `id`, `problem` and `answer`. Raises TaskError if data are missing or a row lacks a value.
    """
    found = list(islice(_all(task, data_dir), limit))
    if not found:
        raise TaskError(f"{task.name}: its data hold no problem")
    twice = [identity for identity, times in Counter(problem.id for problem in found).items() if times > 1]
    if twice:
        raise TaskError(f"{task.name}: ids must differ, but these are repeated: {', '.join(twice[:3])}")
    return found


def check_task(task: Task, data_dir: str | Path | None = None) -> dict[str, str]:
    """The resolved value of each field of `task`, without a download. Raises TaskError for a field without one.

    Local data are read up to the first problem. For hub data the name is checked, and a copy in `data_dir` is read.
    """
    local = task.data.hub is None or _copy(task, data_dir) is not None
    first = problems(task, 1, data_dir)[0] if local else None
    return {
        "name": task.name,
        "data": _where(task, data_dir),
        "problem": f"{first.id}: {first.question}" if first else f"read from column {task.columns.question}",
        "answer": first.answer if first else f"read from column {task.columns.answer}",
        "prompt": first.prompt if first else task.prompt,
        "style": task.style,
        "grader": task.grader,
        "samples": str(task.samples),
        "sampling": f"temperature {task.temperature:g}, top_p {task.top_p:g}, {task.max_tokens:,} tokens at most"
        + "".join(f", stop at {text!r}" for text in task.stop)
        + (f", stop when a token repeats {task.stop_on_repeat} times" if task.stop_on_repeat else ""),
    }


def _where(task: Task, data_dir: str | Path | None) -> str:
    if task.data.demo:
        demo = task.data.demo
        return f"{demo.n} {demo.split} questions each of {', '.join(map(str, demo.hops))} hops, embedded"
    hub = task.data.hub
    path = _copy(task, data_dir) if hub else _file(task)
    if path:
        return str(path)
    assert hub is not None
    parts = (hub.name, hub.config, f"split {hub.split}", f"revision {hub.revision or 'main'}")
    return "hub: " + ", ".join(part for part in parts if part)


def _all(task: Task, data_dir: str | Path | None) -> Iterator[Problem]:
    data = task.data
    if data.demo:
        yield from _demo(task, data.demo)
        return
    copy = _copy(task, data_dir) if data.hub else None
    if copy:
        # A copy holds only the task's problems, with extracted answers.
        columns = COPY.model_copy(update={"wrong": task.columns.wrong})
        task = task.model_copy(update={"columns": columns, "where": {}, "boxed_answer": False})
    rows = _hub_rows(data.hub) if data.hub and not copy else _file_rows(copy or _file(task))
    yield from _from_rows(task, rows)


def _demo(task: Task, demo: Demo) -> Iterator[Problem]:
    """The questions of the embedded task. Hop counts take turns, so that a `limit` keeps all of them."""
    try:
        by_hops = {hops: questions(demo.split, hops, demo.n) for hops in demo.hops}
    except ValueError as error:
        raise TaskError(f"{task.name}: {error}") from None
    for number in range(demo.n):
        for hops in demo.hops:
            question = by_hops[hops][number]
            prompt = task.prompt.replace(QUESTION, question.text)
            yield Problem(f"{hops}-{number:04d}", question.text, question.answer, prompt)


def _copy(task: Task, data_dir: str | Path | None) -> Path | None:
    path = Path(data_dir or "") / f"{task.name}.jsonl"
    return path if data_dir is not None and path.exists() else None


def _file(task: Task) -> Path:
    assert task.data.file is not None
    return task.folder / Path(task.data.file).expanduser()


def _file_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        for number, row in numbered_rows(path):
            yield f"{path}, line {number}", row
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror}") from None
    except UnreadableLine as error:
        raise TaskError(f"{error}; a task's data are JSONL, one JSON object a line") from None


def _hub_rows(hub: Hub) -> Iterator[tuple[str, Mapping[str, Any]]]:
    from datasets import load_dataset  # seconds of import, and only needed for hub data

    try:
        rows: Iterable[Mapping[str, Any]] = load_dataset(hub.name, hub.config, split=hub.split, revision=hub.revision)
    except Exception as error:  # the hub's client raises many types: unknown set or split, no access, no network
        reason = str(error).strip().partition("\n")[0] or repr(error)
        raise TaskError(
            f"{hub.name} cannot be loaded from the hub: {reason}\nFor a gated data set (such as GPQA), accept the "
            "conditions on its page and set HF_TOKEN. Without a network, use a folder of copies (docs/tasks.md)."
        ) from error
    for number, row in enumerate(rows):
        yield f"{hub.name}, split {hub.split}, row {number}", row


def _from_rows(task: Task, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[Problem]:
    """The problems of `rows`, each with its place in the data."""
    for number, (place, row) in enumerate(rows):
        try:
            problem = _problem(task, row, number)
        except _RowError as error:
            raise TaskError(f"{task.name}, row {number}: {error} ({place})") from None
        if problem:
            yield problem


class _RowError(ValueError):
    """A row is no problem of its task. The message says why and what to do."""


def _problem(task: Task, row: Mapping[str, Any], number: int) -> Problem | None:
    """The problem of a row; None if the task's `where` leaves it out. Raises _RowError."""
    columns = task.columns
    if any(_value(row, column) != str(value) for column, value in task.where.items()):
        return None
    identity = _value(row, columns.id) if columns.id else str(number)
    question = _value(row, columns.question).strip()
    answer = _value(row, columns.answer).strip()
    if task.boxed_answer:
        box = last_box(answer)
        if box is None:
            raise _RowError(f"{columns.answer} has no \\boxed{{}}")
        answer = box
    if columns.wrong:
        wrong = [_value(row, column).strip() for column in columns.wrong]
        question, answer = _lettered(task.name, identity, question, answer, wrong)
    elif reason := unanswerable(task.grader, answer, _LETTERED.findall(question)):
        raise _RowError(f"{columns.answer} is {answer!r}: {reason}")
    return Problem(identity, question, answer, task.prompt.replace(QUESTION, question))


def _value(row: Mapping[str, Any], column: str) -> str:
    """The text of a column. Numbers are written as decimals: 27.0 as 27, 1e-7 as 0.0000001."""
    if column not in row:
        raise _RowError(f"no column {column}; its columns are {', '.join(map(str, row))}")
    value = row[column]
    if isinstance(value, float):
        if not isfinite(value):
            raise _RowError(f"{column} is {value}, which is no number; text may be given in quotes")
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else format(Decimal(repr(value)), "f")
    if not isinstance(value, str | int):
        raise _RowError(f"{column} is {json.dumps(value, default=str)}, but must be text or a number")
    return str(value)


def _lettered(task: str, identity: str, question: str, right: str, wrong: list[str]) -> tuple[str, str]:
    """The question with its lettered options, and the letter of the right one. The order depends only on the id."""
    options = [right, *wrong]
    if len(options) > len(ascii_uppercase):
        raise TaskError(
            f"{task}, {identity}: {len(options)} options, but there are only {len(ascii_uppercase)} letters"
        )
    order = list(range(len(options)))
    random.Random(hashlib.sha256(f"{task}/{identity}".encode()).digest()).shuffle(order)
    lines = [f"{letter}. {options[place]}" for letter, place in zip(ascii_uppercase, order, strict=False)]
    return "\n".join([question, "", *lines]), ascii_uppercase[order.index(0)]
