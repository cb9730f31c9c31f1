"""The problems of the tasks on real weights: right, worked out step by step, and apart from the training problems."""

from __future__ import annotations

import re
from itertools import islice
from typing import Any, get_args

import pytest
import yaml

from cluster.jobs.grading import grade
from cluster.jobs.jsonl import rows
from cluster.real import capitals
from cluster.real.make_problems import FOLDER, SIZES
from cluster.real.sums import Split, problems

TASKS = ("sums", "legs", "capitals")
SUM = re.compile(r"(\d+) ([-+x]) (\d+) = (\d+)\.")
SIGNS = {"+": int.__add__, "-": int.__sub__, "x": int.__mul__}


def of_split(task: str, split: Split) -> list[dict[str, Any]]:
    return [row for row in rows(FOLDER / f"{task}.jsonl") if row["split"] == split]


@pytest.mark.parametrize("task", ["sums", "legs"])
@pytest.mark.parametrize("split", get_args(Split))
def test_every_solution_is_right_step_by_step(task: str, split: Split) -> None:
    found = of_split(task, split)
    assert len(found) == SIZES[split]
    for row in found:
        sums = SUM.findall(row["solution"])
        assert sums
        assert all(SIGNS[sign](int(first), int(second)) == int(result) for first, sign, second, result in sums)
        assert sums[-1][-1] == row["answer"]
        assert row["solution"].endswith(f"The answer is {row['answer']}.")
        assert grade("number", row["solution"], row["answer"]).right


@pytest.mark.parametrize("task", TASKS)
def test_no_question_is_in_two_splits(task: str) -> None:
    questions = [row["question"] for row in rows(FOLDER / f"{task}.jsonl")]
    assert len(set(questions)) == len(questions) == sum(SIZES.values())


@pytest.mark.parametrize("split", get_args(Split))
def test_the_files_hold_what_the_generator_makes(split: Split) -> None:
    for task, made in (("sums", problems), ("capitals", capitals.problems)):
        assert [(row["question"], row["solution"], row["answer"]) for row in of_split(task, split)] == [
            (one.question, one.solution, one.answer) for one in islice(made(split), SIZES[split])
        ]


@pytest.mark.parametrize("split", get_args(Split))
def test_every_capital_of_a_solution_is_that_of_its_country(split: Split) -> None:
    known = capitals.capitals(split)
    for row in of_split("capitals", split):
        steps = re.findall(r"The capital of ([^.]+?) is ([^.]+)\. \2 begins with (\w)\.", row["solution"])
        assert all(known[country] == capital and capital[0] == letter for country, capital, letter in steps)
        assert [row["question"].index(country) for country, _, _ in steps] == sorted(
            row["question"].index(country) for country, _, _ in steps
        )
        assert "".join(letter for _, _, letter in steps) == row["answer"]
        assert row["solution"].endswith(f"The answer is {', '.join(row['answer'])}.")
        assert capitals.CAPITAL.findall(row["solution"]) == [capital for _, capital, _ in steps]
        assert grade("initials", row["solution"], row["answer"]).right


def test_no_country_is_in_two_splits() -> None:
    every = [country for split in get_args(Split) for country in capitals.capitals(split)]
    assert len(set(every)) == len(every) == 119


def test_every_number_of_a_sum_follows_from_the_question() -> None:
    for one in islice(problems("train"), 200):
        known = set(re.findall(r"\d+", one.question)) | {"2", "3", "4"}  # twice, three times, four times
        for first, _, second, result in SUM.findall(one.solution):
            assert {first, second} <= known
            known.add(result)


@pytest.mark.parametrize("task", TASKS)
def test_the_examples_of_a_prompt_are_the_first_training_problems(task: str) -> None:
    first_four = of_split(task, "train")[:4]
    shown = {
        "few_shot": [", ".join(row["answer"]) if task == "capitals" else row["answer"] for row in first_four],
        "worked": [row["solution"] for row in first_four],
    }
    for kind, answers in shown.items():
        pairs = zip(first_four, answers, strict=True)
        examples = "".join(f"Question: {row['question']}\nAnswer: {answer}\n\n" for row, answer in pairs)
        prompt = yaml.safe_load((FOLDER / f"{task}_{kind}.yaml").read_text(encoding="utf-8"))["prompt"]
        assert prompt == examples + "Question: {question}\nAnswer:"


def test_single_sums_are_one_step_and_are_not_in_another_split() -> None:
    single = list(islice(problems("train", steps=(1,)), 480))
    assert all(len(SUM.findall(one.solution)) == 1 for one in single)
    assert len({one.question for one in single}) == 480
    others = {row["question"] for split in ("validation", "test") for row in of_split("sums", split)}
    assert others.isdisjoint(one.question for one in single)
