"""The choice of answers for preference pairs, and their split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.jobs.pairs import CHOSEN, SAMPLED, Pair, Pairing, PromptedProblem, Split, pairs, split_of
from cluster.jobs.sample import ALONE, Key, Mode, Sample


def problems(count: int, task: str = "t") -> list[PromptedProblem]:
    return [PromptedProblem(task, f"p{i}", f"question {i}", {"guider": f"<user>question {i}"}) for i in range(count)]


def sample(problem: str, mode: Mode, number: int, right: bool, **changed: Any) -> Sample:
    fields: dict[str, Any] = {
        "text": f"{mode} {number} of {problem} is {'right' if right else 'wrong'}",
        "extracted": "x",
        "finish": "stop",
        "prompt_tokens": 3,
        "tokens": 20,
        "reasoning_tokens": 0,
        "guided_tokens": 0,
        "changed_tokens": 0,
    }
    return Sample(Key("t", problem, mode, ALONE, 0, number), right=right, **(fields | changed))


def answers(count: int, target: Sequence[bool], guider: Sequence[bool]) -> list[Sample]:
    """The same pattern of right and wrong answers to each of `count` problems."""
    return [
        sample(f"p{i}", mode, number, right)
        for i in range(count)
        for mode, pattern in zip(SAMPLED, (target, guider), strict=True)
        for number, right in enumerate(pattern)
    ]


def all_of(made: dict[Split, list[Pair]]) -> list[Pair]:
    return list(chain(*made.values()))


def test_a_pair_is_one_models_right_and_the_others_wrong_answer() -> None:
    made = all_of(pairs(answers(40, [True, False], [True, False]), problems(40), Pairing()))
    assert made
    for pair in made:
        assert (pair.chosen.key.mode, pair.rejected.key.mode) == CHOSEN[pair.kind]
        assert pair.chosen.right
        assert not pair.rejected.right
        assert pair.chosen.key.problem == pair.rejected.key.problem == pair.problem.id
        row = pair.row()
        assert (row["prompt"], row["chosen"], row["rejected"]) == (
            pair.problem.prompts["guider"],
            pair.chosen.text,
            pair.rejected.text,
        )


def test_equal_verdicts_of_both_models_make_no_pair() -> None:
    for pattern in ([True], [False]):
        assert not all_of(pairs(answers(20, pattern, pattern), problems(20), Pairing()))


def test_no_question_is_in_both_splits_even_if_two_tasks_have_it() -> None:
    all_problems = problems(200) + [
        PromptedProblem("other", one.id, f"  {one.question} ", one.prompts) for one in problems(200)
    ]
    samples = answers(200, [True], [False])
    pairing = Pairing(validation=0.3, balanced=False)
    made = pairs(samples, all_problems, pairing)
    train, validation = ({pair.problem.question for pair in made[split]} for split in ("train", "validation"))
    assert train
    assert validation
    assert not train & validation
    assert all(split_of(one.question, pairing) == split_of(f" {one.question}", pairing) for one in all_problems)
    assert len(validation) / 200 == pytest.approx(0.3, abs=0.1)


def test_balanced_kinds_are_equally_many_within_the_limit() -> None:
    samples = answers(30, [True, True, True], [False, False, True])  # only the guider gives wrong answers
    samples += [sample(f"q{i}", "target", 0, False) for i in range(12)]
    samples += [sample(f"q{i}", "guider", 0, True) for i in range(12)]
    all_problems = problems(30) + [PromptedProblem("t", f"q{i}", f"other {i}", {"guider": "x"}) for i in range(12)]
    for most in (1_000, 10):
        made = pairs(samples, all_problems, Pairing(most=most, validation=0.2))
        for split in made.values():
            kinds = Counter(pair.kind for pair in split)
            assert kinds["target_right"] == kinds["guider_right"]
        assert len(all_of(made)) <= most
    loose = Counter(pair.kind for pair in all_of(pairs(samples, all_problems, Pairing(balanced=False))))
    assert loose["target_right"] > loose["guider_right"] == 12


def test_equal_texts_pair_once_and_problems_take_turns() -> None:
    samples = [sample("p0", "target", n, True, text="same") for n in range(4)]
    samples += [sample("p0", "guider", n, False, text="also the same") for n in range(4)]
    made = all_of(pairs(samples, problems(1), Pairing(balanced=False)))
    assert len(made) == 1
    many = pairs(answers(50, [True] * 4, [False] * 4), problems(50), Pairing(balanced=False, validation=0.01))["train"]
    texts = [(pair.chosen.text, pair.rejected.text) for pair in many]
    assert len(set(texts)) == len(texts)
    first = {pair.problem.id for pair in many}
    assert {pair.problem.id for pair in many[: len(first)]} == first
    assert max(Counter(pair.problem.id for pair in many).values()) == 4


def test_guesses_are_never_chosen_and_truncated_answers_optional() -> None:
    samples = [sample("p0", "target", 0, True, tokens=5), sample("p0", "guider", 0, False, finish="length")]
    for keys, count in (
        ({}, 1),
        ({"min_chosen_tokens": 5}, 1),
        ({"min_chosen_tokens": 6}, 0),
        ({"finished_only": True}, 0),
    ):
        made = all_of(pairs(samples, problems(1), Pairing(balanced=False, **keys)))
        assert len(made) == count
        assert not made or not made[0].row()["rejected_finished"]


def test_pairs_depend_on_samples_and_seed_but_not_on_their_order() -> None:
    samples = answers(60, [True, True, False], [False, True, False])
    first = pairs(samples, problems(60), Pairing(per_problem=1))
    assert pairs(samples[::-1], problems(60), Pairing(per_problem=1)) == first
    assert pairs(samples, problems(60), Pairing(per_problem=1, seed=1)) != first


def test_an_invalid_pairing_is_refused() -> None:
    refused: list[dict[str, Any]] = [{"kinds": []}, {"kinds": ["target_right"] * 2}, {"validation": 0}, {"most": 0}]
    for wrong in [*refused, {"pears": 1}]:
        with pytest.raises(ValidationError):
            Pairing.model_validate(wrong)
