from __future__ import annotations

from itertools import islice

from benchmarks.real_prompts import TEXTS, prompts, sums
from cluster.real.sums import problems


def test_sums_are_worked_out_but_for_the_last_one() -> None:
    drawn = list(islice(problems("train"), 3))
    text = sums(drawn)
    assert [one.question in text for one in drawn] == [True] * 3
    assert [one.solution in text for one in drawn] == [True, True, False]
    assert text.endswith(f"{drawn[-1].question}\nAnswer:")


def test_32_prompts_are_all_different_and_another_seed_gives_other_sums() -> None:
    some, others = list(islice(prompts(), 32)), list(islice(prompts(1), 32))
    assert len(set(some)) == 32
    assert set(some) & set(others) == set(TEXTS)
    assert some == list(islice(prompts(), 32))
