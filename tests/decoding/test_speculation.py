"""The number of drafts: expected yield and best length; and drafts from the text itself."""

from __future__ import annotations

import itertools
import random

import pytest

from actors.decoding.speculation import Acceptance, TextIndex, best_length


@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.8, 0.95, 1.0])
def test_the_length_has_the_best_rate_by_the_equation_of_leviathan(acceptance: float) -> None:
    seconds = [30, 31, 32.5, 36, 37, 37.5, 45, 46]

    def rate(drafts: int) -> float:
        if acceptance == 1:
            return (drafts + 1) / seconds[drafts]
        return (1 - acceptance ** (drafts + 1)) / (1 - acceptance) / seconds[drafts]

    assert best_length(acceptance, seconds) == max(range(8), key=rate)


def test_cheap_drafts_reach_the_limit_and_expensive_ones_are_not_made() -> None:
    assert best_length(0.8, [1.0] * 8) == 7
    assert best_length(0.8, [1.0 + n for n in range(8)]) == 0
    assert best_length(0.0, [1.0] * 8) == 0
    assert best_length(0.8, [0.0] * 8) == 7  # nothing is known yet


def test_the_better_the_drafts_the_more_are_made() -> None:
    lengths = [best_length(p / 20, [30 + 2.0 * n + 1.5 * n for n in range(8)]) for p in range(20)]
    assert lengths == sorted(lengths)
    assert lengths[0] == 0
    assert lengths[-1] == 7


def test_acceptance_converges_to_the_share_of_accepted_drafts() -> None:
    draw = random.Random(0)
    acceptance = Acceptance(prior=0.2)
    assert acceptance.rate == pytest.approx(0.2)
    rates = []
    for _ in range(500):
        kept = next((i for i in range(4) if draw.random() > 0.8), 4)
        acceptance.record(4, kept)
        rates.append(acceptance.rate)
    assert sum(rates[100:]) / 400 == pytest.approx(0.8, abs=0.03)


def test_drafts_after_the_first_rejected_one_are_not_counted() -> None:
    one, many = Acceptance(0.5), Acceptance(0.5)
    one.record(2, 1)
    many.record(8, 1)
    assert one.rate == many.rate


def test_drafting_that_does_not_pay_is_tried_more_and_more_rarely() -> None:
    acceptance = Acceptance(0.1)
    tries = [number for number in range(2_000) if not acceptance.rest()]
    gaps = [b - a for a, b in itertools.pairwise(tries)]
    assert gaps == sorted(gaps)
    assert (tries[0], gaps[-1]) == (7, 128)


def test_text_drafts_follow_an_earlier_occurrence() -> None:
    assert TextIndex().drafts([1, 2, 3, 4, 9, 1, 2, 3, 4], 3) == [9, 1, 2]
    assert TextIndex().drafts([1, 2, 3, 4], 3) == []
    assert TextIndex().drafts([5, 6, 7, 5, 6], 8) == [7, 5, 6]


def test_a_longer_match_precedes_a_later_one() -> None:
    tokens = [1, 2, 3, 4, 10, 7, 3, 4, 11, 1, 2, 3, 4]
    assert TextIndex().drafts(tokens, 1) == [10]


@pytest.mark.parametrize("seed", range(3))
def test_a_growing_text_index_drafts_like_a_new_one(seed: int) -> None:
    draw = random.Random(seed)
    growing, tokens = TextIndex(), list[int]()
    for _ in range(200):
        tokens.append(draw.randrange(3))
        assert growing.drafts(tokens, 4) == TextIndex().drafts(tokens, 4)
