"""The problems of a task: rows of its data, made into prompts and gold answers."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from cluster.demo.task import questions
from cluster.jobs.grading import last_box
from cluster.jobs.task_file import QUESTION, Columns, Demo, Hub, Task, TaskError, load_task, shipped

__all__ = ["Problem", "Task", "TaskError", "check_task", "load_task", "problems", "shipped"]

COPY = Columns(id="id", question="problem", answer="answer")  # what a copy of a hub's data calls its columns


@dataclass(frozen=True, slots=True)
class Problem:
    """One question of a task. prompt: the text that is sent, or the user's message where the task's style is chat."""

    id: str
    question: str
    answer: str  # gold, as the task's grader reads it
    prompt: str


def problems(task: Task, limit: int | None = None, data_dir: str | Path | None = None) -> list[Problem]:
    """The first `limit` problems of `task` (default: all), in the order of its data.

    Hub data are downloaded into the hub's cache, unless the folder `data_dir` holds a copy: `<task name>.jsonl` of
    rows with `id`, `problem` and `answer`. Raises TaskError where data are absent or a row lacks a value.
    """
    found = list(islice(_all(task, data_dir), limit))
    if not found:
        raise TaskError(f"{task.name}: no row of its data is a problem")
    twice = [identity for identity, times in Counter(problem.id for problem in found).items() if times > 1]
    if twice:
        raise TaskError(f"{task.name}: ids must differ, but {', '.join(twice[:3])} stand more than once")
    return found


def check_task(task: Task, data_dir: str | Path | None = None) -> dict[str, str]:
    """What each field of `task` resolves to, without a download. Raises TaskError where one resolves to nothing.

    Local data are read and their first problem is made; of hub data the name is checked, and a copy in `data_dir`.
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
        + (f", stop when a token stands {task.stop_on_repeat} times in a row" if task.stop_on_repeat else ""),
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
        # A copy holds the task's problems alone, their answers ready.
        columns = COPY.model_copy(update={"wrong": task.columns.wrong})
        task = task.model_copy(update={"columns": columns, "where": {}, "boxed_answer": False})
    rows = _hub_rows(data.hub) if data.hub and not copy else _file_rows(copy or _file(task))
    yield from _from_rows(task, rows)


def _demo(task: Task, demo: Demo) -> Iterator[Problem]:
    """The hop counts take turns, so that the first few problems are of all of them."""
    try:
        asked = {hops: questions(demo.split, hops, demo.n) for hops in demo.hops}
    except ValueError as error:
        raise TaskError(f"{task.name}: {error}") from None
    for number in range(demo.n):
        for hops in demo.hops:
            question = asked[hops][number]
            prompt = task.prompt.replace(QUESTION, question.text)
            yield Problem(f"{hops}-{number:04d}", question.text, question.answer, prompt)


def _copy(task: Task, data_dir: str | Path | None) -> Path | None:
    path = Path(data_dir or "") / f"{task.name}.jsonl"
    return path if data_dir is not None and path.exists() else None


def _file(task: Task) -> Path:
    assert task.data.file is not None
    return task.folder / Path(task.data.file).expanduser()


def _file_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise TaskError(f"{path}, line {number}: not a JSON object")
                yield row
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, TaskError):
            raise
        raise TaskError(f"{path} is not JSONL: {error}") from None


def _hub_rows(hub: Hub) -> Iterable[Mapping[str, Any]]:
    from datasets import load_dataset  # seconds of import, and only for data of the hub

    try:
        rows: Iterable[Mapping[str, Any]] = load_dataset(hub.name, hub.config, split=hub.split, revision=hub.revision)
    except Exception as error:  # the hub's client raises a dozen kinds: no such set, split, access, network
        reason = str(error).strip().partition("\n")[0] or repr(error)
        raise TaskError(
            f"{hub.name} cannot be loaded from the hub: {reason}\nA set with conditions (GPQA has some) needs them "
            "accepted on its page and HF_TOKEN set; without a network, name a folder of copies (docs/tasks.md)."
        ) from error
    return rows


def _from_rows(task: Task, rows: Iterable[Mapping[str, Any]]) -> Iterator[Problem]:
    columns = task.columns
    for number, row in enumerate(rows):
        if any(_value(task, row, number, column) != str(value) for column, value in task.where.items()):
            continue
        identity = _value(task, row, number, columns.id) if columns.id else str(number)
        question = _value(task, row, number, columns.question).strip()
        answer = _value(task, row, number, columns.answer).strip()
        if task.boxed_answer:
            box = last_box(answer)
            if box is None:
                raise TaskError(f"{task.name}, row {number}: {columns.answer} has no \\boxed{{}}")
            answer = box
        if columns.wrong:
            wrong = [_value(task, row, number, column).strip() for column in columns.wrong]
            question, answer = _lettered(task.name, identity, question, answer, wrong)
        yield Problem(identity, question, answer, task.prompt.replace(QUESTION, question))


def _value(task: Task, row: Mapping[str, Any], number: int, column: str) -> str:
    value = row.get(column)
    if value is None:
        raise TaskError(f"{task.name}, row {number}: no {column}; its columns are {', '.join(map(str, row))}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # some sets keep answers like 27 as 27.0
    return str(value)


def _lettered(task: str, identity: str, question: str, right: str, wrong: list[str]) -> tuple[str, str]:
    """The question followed by its options, and the right one's letter, in an order that the id alone decides."""
    options = [right, *wrong]
    if len(options) > len(ascii_uppercase):
        raise TaskError(f"{task}, {identity}: {len(options)} options are more than there are letters")
    order = list(range(len(options)))
    random.Random(hashlib.sha256(f"{task}/{identity}".encode()).digest()).shuffle(order)
    lines = [f"{letter}. {options[place]}" for letter, place in zip(ascii_uppercase, order, strict=False)]
    return "\n".join([question, "", *lines]), ascii_uppercase[order.index(0)]
