"""Task files: the shipped ones, a user's own, and the messages for wrong ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.demo.task import questions
from cluster.jobs.grading import grade
from cluster.jobs.task_loading import Task, TaskError, check_task, load_task, problems, shipped

ROOT = Path(__file__).parents[2]
FOLDER = os.environ.get("THINKLOGIT_BENCHMARKS")
PUBLISHED = ("aime2024", "aime2025", "amc23", "gpqa_diamond", "math500", "math_level5")
TRAINING = ("math_train_level4", "math_train_level5", "multihop_train")  # tasks for preference pairs
ROWS = ({"id": "a", "question": " 1 + 1 = ? ", "answer": "2"}, {"id": "b", "question": "2 + 2 = ?", "answer": 4})


def write(folder: Path, rows: Sequence[Mapping[str, Any]], **fields: Any) -> str:
    """Write a task file over `rows` with the required keys and `fields`. Returns its path."""
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {"name": "mine", "data": {"file": "mine.jsonl"}, "grader": "math", **fields}
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(task), encoding="utf-8")
    return str(path)


def test_published_tasks_have_the_published_sampling() -> None:
    assert set(shipped()) == {*PUBLISHED, *TRAINING, "multihop"}
    for name in PUBLISHED:
        task = load_task(name)
        assert (task.name, task.style, task.samples, task.max_tokens) == (name, "raw", 8, 8_192)
        assert (task.temperature, task.top_p, task.stop_on_repeat) == (0.6, 0.95, 10)
        assert task.grader == ("letter" if name == "gpqa_diamond" else "math")
        assert task.prompt.endswith("\n\nQuestion: {question}")


def test_training_tasks_use_training_problems_and_the_same_prompts() -> None:
    for name, asked in zip(TRAINING, ("math_level5", "math_level5", "multihop"), strict=True):
        training, evaluated = load_task(name), load_task(asked)
        assert "train" in check_task(training)["data"]
        assert (training.prompt, training.style, training.grader) == (
            evaluated.prompt,
            evaluated.style,
            evaluated.grader,
        )
        assert training.temperature > 0, "samples of one problem differ"


def test_mathematics_tasks_have_the_published_prompt() -> None:
    prompt = "Solve the following math problem. Put your final answer within \\boxed{}.\n\nQuestion: {question}"
    assert {load_task(name).prompt for name in PUBLISHED if name != "gpqa_diamond"} == {prompt}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shipped_task_resolves_without_a_download(name: str) -> None:
    resolved = check_task(load_task(name))
    assert resolved["data"].startswith("hub: ")
    assert "split" in resolved["data"]
    assert resolved["prompt"] == load_task(name).prompt


def test_multihop_has_the_benchmarks_questions_with_hops_in_turn() -> None:
    task = load_task("multihop")
    found = problems(task)
    assert len(found) == 400
    for hops in (2, 3, 4, 5):
        asked = questions("held_out", hops, 100)
        of_hops = [problem for problem in found if problem.id.startswith(f"{hops}-")]
        assert [(p.prompt, p.answer) for p in of_hops] == [(q.text, q.answer) for q in asked]
    assert [problem.id for problem in problems(task, 5)] == ["2-0000", "3-0000", "4-0000", "5-0000", "2-0001"]
    assert check_task(task)["problem"].startswith("2-0000: Who is ")


def test_data_paths_are_relative_to_the_task_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, ROWS, prompt="Q: {question}\nA: \\boxed{}", columns={"id": "id"}, samples=3)
    monkeypatch.chdir("/")
    task = load_task(path)
    first, second = problems(task)
    assert (first.id, first.question, first.answer) == ("a", "1 + 1 = ?", "2")
    assert first.prompt == "Q: 1 + 1 = ?\nA: \\boxed{}"
    assert second.answer == "4"
    assert problems(task, 1) == [first]
    assert problems(task.model_copy(update={"samples": 1})) == [first, second]
    assert Path(check_task(task)["data"]) == tmp_path / "mine.jsonl"


def test_without_an_id_column_the_row_number_is_the_id(tmp_path: Path) -> None:
    task = load_task(write(tmp_path, [{"question": "a", "answer": 1.0}, {"question": "b", "answer": 0.5}]))
    assert [(problem.id, problem.answer) for problem in problems(task)] == [("0", "1"), ("1", "0.5")]


def test_where_selects_rows_and_boxed_answer_reads_solutions(tmp_path: Path) -> None:
    rows = [
        {"question": "easy", "answer": r"\boxed{1}", "level": "Level 1"},
        {"question": "hard", "answer": r"First \boxed{2}, so \boxed{\frac{3}{4}}.", "level": "Level 5"},
    ]
    task = load_task(write(tmp_path, rows, where={"level": "Level 5"}, boxed_answer=True))
    assert [(problem.id, problem.answer) for problem in problems(task)] == [("1", r"\frac{3}{4}")]


def test_the_order_of_options_depends_only_on_the_id(tmp_path: Path) -> None:
    rows = [{"id": n, "question": f"{n}?", "answer": f"right {n}", "w1": "x", "w2": "y", "w3": "z"} for n in range(200)]
    columns = {"id": "id", "wrong": ["w1", "w2", "w3"]}
    task = load_task(write(tmp_path, rows, columns=columns, grader="letter"))
    found = problems(task)
    for number, problem in enumerate(found):
        assert f"\n{problem.answer}. right {number}" in problem.question
        assert re.findall(r"^([A-D])\. ", problem.question, re.MULTILINE) == list("ABCD")
        assert grade("letter", rf"\boxed{{{problem.answer}}}", problem.answer).right
    letters = Counter(problem.answer for problem in found)
    assert set(letters) == set("ABCD")
    assert min(letters.values()) > 30
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)), encoding="utf-8")
    assert problems(task) == found[::-1]


def test_a_folder_of_copies_replaces_the_hub(tmp_path: Path) -> None:
    rows = [{"id": "a", "problem": "What is 1/2?", "answer": "0.5"}]
    (tmp_path / "math_level5.jsonl").write_text(json.dumps(rows[0]), encoding="utf-8")
    task = load_task("math_level5")
    (found,) = problems(task, data_dir=tmp_path)
    assert (found.id, found.answer) == ("a", "0.5")
    assert found.prompt.endswith("Question: What is 1/2?")
    assert check_task(task, tmp_path)["problem"] == "a: What is 1/2?"
    assert check_task(load_task("math500"), tmp_path)["data"].startswith("hub: ")


@pytest.mark.skipif(not FOLDER, reason="THINKLOGIT_BENCHMARKS names no folder of benchmark files")
@pytest.mark.parametrize(("name", "size"), [("aime2024", 30), ("aime2025", 30), ("amc23", 40), ("math500", 500)])
def test_benchmark_files_are_read_completely(name: str, size: int) -> None:
    found = problems(load_task(name), data_dir=FOLDER)
    assert len(found) == size
    assert all(problem.question and problem.answer and problem.question in problem.prompt for problem in found)


def test_hub_data_are_read_and_missing_data_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "owner" / "set"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text(json.dumps({"Problem": "1 + 1", "Answer": 2}), encoding="utf-8")
    code = (
        "from cluster.jobs.task_loading import Task, TaskError, problems\n"
        "hub = lambda name: {'hub': {'name': name}}\n"
        "columns = {'question': 'Problem', 'answer': 'Answer'}\n"
        "make = lambda name: Task(name='t', data=hub(name), columns=columns, grader='math')\n"
        "print(problems(make('owner/set')))\n"
        "try: problems(make('owner/other'))\n"
        "except TaskError as error: print(error)\n"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "Problem(id='0', question='1 + 1', answer='2', prompt='1 + 1')" in done.stdout, done.stderr
    assert "owner/other cannot be loaded from the hub: " in done.stdout


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"sample": 3}, "sample: unknown key; did you mean samples?"),
        ({"columns": {"answers": "x"}}, "columns.answers: unknown key; did you mean answer?"),
        ({"prompt": "Solve it."}, "prompt must contain {question} once, not 0 times"),
        ({"data": {}}, "data: exactly one of hub, file and demo"),
        ({"data": {"file": "x", "demo": {}}}, "not 2 of them"),
        ({"data": {"demo": {"hops": 9}}, "grader": "multihop"}, "data.demo.hops.0: "),
        ({"data": {"hub": {"name": "a/b/c"}}}, "data.hub.name: "),
        ({"grader": "maths"}, "grader: "),
        ({"grader": "multihop"}, "grader multihop and data.demo"),
        ({"columns": {"wrong": ["x"]}}, "it needs grader letter"),
        ({"temperature": -1}, "temperature: "),
        ({"samples": 0}, "samples: "),
        ({"stop_on_repeat": 1}, "at least 2"),
        ({"name": "../mine"}, "name: "),
    ],
)
def test_a_wrong_task_is_refused_and_the_key_is_named(tmp_path: Path, fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TaskError, match=re.escape(sentence)):
        load_task(write(tmp_path, ROWS, **fields))


@pytest.mark.parametrize(
    ("rows", "fields", "sentence"),
    [
        ([{"question": "a"}], {}, "mine, row 0: no column answer; its columns are question"),
        ([], {}, "its data hold no problem"),
        (ROWS, {"where": {"id": "c"}}, "its data hold no problem"),
        ([ROWS[0], ROWS[0]], {"columns": {"id": "id"}}, "ids must differ, but these are repeated: a"),
        (ROWS, {"boxed_answer": True}, "mine, row 0: answer has no \\boxed{}"),
        (ROWS, {"data": {"file": "other.jsonl"}}, "other.jsonl cannot be read: No such file"),
        (ROWS, {"data": {"file": "mine.yaml"}}, "mine.yaml, line 1: not JSON: Expecting value at column 1"),
        ([{"question": "a", "answer": None}], {}, "mine, row 0: answer is null, but must be text or a number"),
        ([{"question": "a", "answer": [1, 2]}], {}, "mine, row 0: answer is [1, 2], but must be text or a number"),
        ([{"question": "a", "answer": float("nan")}], {}, "mine, row 0: answer is nan, which is no number"),
        ([{"question": "a", "answer": float("inf")}], {}, "mine, row 0: answer is inf, which is no number"),
    ],
)
def test_wrong_data_are_refused_and_the_row_is_named(
    tmp_path: Path, rows: Sequence[Mapping[str, Any]], fields: dict[str, Any], sentence: str
) -> None:
    task = load_task(write(tmp_path, rows, **fields))
    with pytest.raises(TaskError, match=re.escape(sentence)):
        problems(task)


@pytest.mark.parametrize(
    ("grader", "answer", "reason"),
    [
        ("letter", "Paris", "grader letter needs an option's letter, such as B or (B)"),
        ("letter", "", "grader letter needs an option's letter"),
        ("letter", 2, "grader letter needs an option's letter"),
        ("letter", "A or C", "grader letter needs an option's letter"),
        ("letter", "E", "the question offers only A, B"),
        ("math", "", "grader math needs LaTeX"),
        ("math", " . ", "grader math needs LaTeX"),
        ("math", r"\frac{1}{", "grader math needs LaTeX without a box and with balanced braces"),
        ("math", r"\frac{1}{2}}", "grader math needs LaTeX without a box and with balanced braces"),
        ("math", "NaN", "grader math needs LaTeX"),
        ("math", r"\text{ }", "grader math needs LaTeX"),
        ("exact", "", "grader exact needs words or a number"),
        ("exact", r"\text{}", "grader exact needs words or a number"),
    ],
)
def test_a_gold_answer_that_none_can_match_is_refused_with_its_line(
    tmp_path: Path, grader: str, answer: str | int, reason: str
) -> None:
    question = "Which?\nA. this\nB. that"
    right = {"letter": "A", "math": "1", "exact": "this"}[grader]
    rows: list[dict[str, Any]] = [{"question": question, "answer": each} for each in (right, answer)]
    with pytest.raises(TaskError) as refused:
        problems(load_task(write(tmp_path, rows, grader=grader)))
    assert f"mine, row 1: answer is {str(answer).strip()!r}: " in str(refused.value)
    assert reason in str(refused.value)
    assert str(refused.value).endswith(f"({tmp_path}/mine.jsonl, line 2)")


def test_numbers_as_gold_answers_are_read_as_decimals(tmp_path: Path) -> None:
    numbers = [27.0, 0.5, 1e-7, -2.5e-8, 1e16, 3, 6.02e23]
    found = problems(load_task(write(tmp_path, [{"question": "a", "answer": number} for number in numbers])))
    expected = ["27", "0.5", "0.0000001", "-0.000000025", "10000000000000000", "3", "602000000000000000000000"]
    assert [problem.answer for problem in found] == expected


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b'{"question": "a", "answer": "1"}\n\n{"question": }\n', "line 3: not JSON: Expecting value at column 14"),
        (b'{"question": "a", "answer": "1"}\r\n\r\n[1]\r\n', "line 3: not a JSON object but a list"),
        (b'{"question": "a", "answer": "1"}\n"text"', "line 2: not a JSON object but a string"),
        (b'{"question": "a", "answer": "1"}\n{"question": "\xff"}\n', "line 2: not UTF-8: byte 0xff at position 15"),
        (b'{"question": "\\ud800", "answer": "1"}\n', "line 1: \\ud800 is half of a surrogate pair"),
        (b'{"question": "a", "answer": "1", "answer": "2"}\n', "line 1: the key 'answer' is repeated"),
        (b'{"question": "a", "answer": "1"} {"question": "b"}\n', "line 1: not JSON: Extra data at column 34"),
        ('{"question": "a", "answer": "1"}\n'.encode("utf-16"), "mine.jsonl is UTF-16: save it as UTF-8"),
    ],
)
def test_a_wrong_line_of_data_is_named_by_its_number(tmp_path: Path, data: bytes, sentence: str) -> None:
    path = write(tmp_path, ROWS)
    (tmp_path / "mine.jsonl").write_bytes(data)
    with pytest.raises(TaskError, match=re.escape(sentence)):
        problems(load_task(path))


def test_data_may_have_a_byte_order_mark_blank_lines_and_crlf(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    lines = '{"question": "\\ud83d\\ude00?", "answer": "1"}\r\n \r\n\r\n{"question": "b\u2028c", "answer": "2"}'
    (tmp_path / "mine.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert [problem.question for problem in problems(load_task(path))] == ["\U0001f600?", "b\u2028c"]


def test_an_unknown_task_gets_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="there is no task 'math50': did you mean math500"):
        load_task("math50")
    with pytest.raises(TaskError, match=re.escape("none.yaml cannot be read: No such file")):
        load_task(str(tmp_path / "none.yaml"))


def test_the_documented_task_loads(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^`(\w+\.\w+)`\n\n((?:    .*\n|\n)+)", page, re.MULTILINE)
    for name, block in blocks:
        text = "\n".join(line.removeprefix("    ") for line in block.splitlines())
        (tmp_path / name).write_text(text, encoding="utf-8")
    task = load_task(str(tmp_path / "capitals.yaml"))
    first, second = problems(task)
    assert first.prompt == "What is the capital of France?\nPut the name alone within \\boxed{}."
    assert grade(task.grader, r"\boxed{Tokyo}", second.answer).right


def test_documented_keys_and_defaults_are_those_of_a_task() -> None:
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    undocumented = [name for name in Task.model_fields if name != "name" and f"`{name}`" not in page]
    assert undocumented == []
    task = Task.model_validate({"name": "t", "data": {"file": "x"}, "grader": "math"})
    assert (task.samples, task.max_tokens, task.temperature, task.top_p) == (1, 8_192, 0.6, 0.95)
    assert (task.style, task.stop, task.stop_on_repeat, task.prompt) == ("chat", (), 0, "{question}")
