from __future__ import annotations

import random
import re
from itertools import islice

from benchmarks.real_prompts import TEXTS, prompts, sums


def test_the_worked_answers_of_sums_are_right_and_the_last_one_is_open() -> None:
    for seed in range(50):
        text = sums(random.Random(seed))
        asked = re.findall(r"has (\d+) \w+, gets (\d+) more and gives (\d+) away", text)
        worked = re.findall(r"The answer is (\d+)\.", text)
        assert [int(has) + int(more) - int(gone) for has, more, gone in asked[:2]] == list(map(int, worked))
        assert len(asked) == 3
        assert text.endswith("\nAnswer:")


def test_32_prompts_are_all_different_and_another_seed_gives_other_sums() -> None:
    some, others = list(islice(prompts(), 32)), list(islice(prompts(1), 32))
    assert len(set(some)) == 32
    assert set(some) & set(others) == set(TEXTS)
    assert some == list(islice(prompts(), 32))
