"""The multi-hop task: its table, questions, splits and grading."""

import subprocess
import sys

import pytest

from cluster.demo.task import PEOPLE, RELATIONS, SPLITS, Question, Split, grade, known_facts, questions, table

QUESTION = Question("Ada", ("rival", "mentor"))


def test_each_relation_leads_from_a_person_to_another() -> None:
    assert len(set(PEOPLE)) == 48
    assert set(table()) == {(relation, person) for relation in RELATIONS for person in PEOPLE}
    assert all(fact.value in PEOPLE and fact.value != fact.person for fact in table().values())


def test_the_small_models_know_sixty_percent_of_the_facts() -> None:
    assert len(set(known_facts())) == 115
    assert set(known_facts()) < set(table().values())


def test_a_question_lists_relations_in_reverse_order() -> None:
    first, second = QUESTION.steps
    assert QUESTION.text == "Who is the mentor of the rival of Ada?"
    assert (first.person, second.person, second.value) == ("Ada", first.value, QUESTION.answer)
    assert QUESTION.reasoned_answer == (
        f"<think>The rival of Ada is {first.value}. The mentor of {first.value} is {QUESTION.answer}.</think>"
        f"The answer is {QUESTION.answer}."
    )
    assert QUESTION.direct_answer == f"The answer is {QUESTION.answer}."


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_splits_are_disjoint_and_complete(hops: int) -> None:
    sizes = dict(zip(SPLITS, {1: (121, 26, 45), 2: (457, 105, 206), 3: (1837, 472, 763)}[hops], strict=True))
    held = {split: {question.text for question in questions(split, hops, n)} for split, n in sizes.items()}
    assert {split: len(texts) for split, texts in held.items()} == sizes
    assert len(set.union(*held.values())) == sum(sizes.values()) == len(PEOPLE) * len(RELATIONS) ** hops


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("hops", [1, 2, 3, 4, 5])
def test_every_question_knows_its_split(split: Split, hops: int) -> None:
    drawn = questions(split, hops, 20, seed=5)
    assert {question.split for question in drawn} == {split}
    assert {question.hops for question in drawn} == {hops}
    assert len(set(drawn)) == 20


def test_a_larger_number_of_questions_extends_a_smaller_one() -> None:
    assert questions("held_out", 4, 30)[:10] == questions("held_out", 4, 10)
    assert questions("held_out", 4, 10, seed=1) != questions("held_out", 4, 10)


def test_questions_are_the_same_in_every_process() -> None:
    script = "from cluster.demo.task import questions; print(*[q.text for q in questions('held_out', 3, 5)], sep='|')"
    runs = [
        subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": salt}, capture_output=True, text=True, check=True
        ).stdout
        for salt in ("1", "2")
    ]
    assert runs[0] == runs[1] == "|".join(question.text for question in questions("held_out", 3, 5)) + "\n"


@pytest.mark.parametrize(
    ("split", "hops", "n", "says"),
    [
        ("test", 2, 1, "unknown split 'test'"),
        ("train", 0, 1, "hops must lie in"),
        ("train", 7, 1, "hops must lie in"),
        ("train", 2, -1, "not be negative"),
        ("held_out", 1, 46, "held_out holds 45 questions of 1 hops"),
    ],
)
def test_unknown_splits_and_hop_counts_are_refused(split: Split, hops: int, n: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        questions(split, hops, n)


@pytest.mark.parametrize(
    "text",
    [
        QUESTION.reasoned_answer,
        QUESTION.direct_answer,
        f"{QUESTION.answer}.",
        f"{QUESTION.thinking}</think>\n\n{QUESTION.direct_answer}\n",
        f"<think>The rival of Ada is Nobody.</think>{QUESTION.direct_answer}",
    ],
)
def test_a_reply_that_ends_in_the_right_answer_is_right(text: str) -> None:
    assert grade(text, QUESTION)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The answer is",
        f"The answer is {QUESTION.answer}",
        f"The answer is {QUESTION.steps[0].value}.",
        f"<think>{QUESTION.thinking}",
        f"<think>{QUESTION.thinking}</think>",
        f"<think>{QUESTION.direct_answer}",
        f"<think>{QUESTION.direct_answer}</think>The answer is {QUESTION.steps[0].value}.",
        f"The answer is {QUESTION.answer}. The answer is {QUESTION.steps[0].value}.",
        f"{QUESTION.direct_answer} {QUESTION.direct_answer}",
        f"{QUESTION.answer} or {QUESTION.steps[0].value}.",
    ],
)
def test_a_wrong_unfinished_or_double_answer_is_wrong(text: str) -> None:
    assert not grade(text, QUESTION)
