"""Estimators compared with brute force, intervals with their coverage, significance tests with known cases."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest

from cluster.jobs.behaviours import Behaviours, behaviours
from cluster.jobs.statistics import (
    Floats,
    difference,
    holm,
    majority_at_k,
    pass_at_1,
    pass_at_k,
    relative_gain,
    significance,
)


def majority(answers: list[tuple[str | None, bool]]) -> float:
    """The vote on one draw, by a plain count."""
    votes = Counter("right" if right else answer for answer, right in answers if right or answer is not None)
    leaders = [answer for answer, count in votes.items() if count == max(votes.values())]
    return ("right" in leaders) / len(leaders) if leaders else 0.0


@pytest.mark.parametrize(("samples", "right"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 6), (8, 3)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(samples: int, right: int) -> None:
    outcomes = [True] * right + [False] * (samples - right)
    for k in range(1, samples + 1):
        draws = [any(draw) for draw in combinations(outcomes, k)]
        assert pass_at_k(samples, right, k) == pytest.approx(sum(draws) / len(draws), abs=1e-12)


def test_majority_at_k_is_the_mean_vote_over_all_draws() -> None:
    random = np.random.default_rng(1)
    for _ in range(60):
        answers = [
            (None, False) if a == 0 else (f"w{a}", False) if a < 4 else (f"r{a}", True)
            for a in random.integers(0, 6, 7).tolist()
        ]
        texts, rights = [text for text, _ in answers], [right for _, right in answers]
        for k in range(1, 8):
            draws = [majority(list(draw)) for draw in combinations(answers, k)]
            assert majority_at_k(texts, rights, k) == pytest.approx(sum(draws) / len(draws), abs=1e-12)


def test_all_forms_of_the_right_answer_vote_together() -> None:
    assert majority_at_k(["1/2", "0.5", "3", "3", "\\frac12"], [True, True, False, False, True], 5) == 1
    assert majority_at_k(["4", "4", "1/2", "0.5"], [False, False, True, True], 4) == 0.5
    assert majority_at_k([None, None, None, "7"], [False, False, False, True], 4) == 1
    assert majority_at_k([None, None], [False, False], 2) == 0


@pytest.mark.parametrize("k", [0, 4])
def test_more_draws_than_samples_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 3"):
        pass_at_k(3, 1, k)
    with pytest.raises(ValueError, match="between 1 and 3"):
        majority_at_k(["1", "2", None], [True, False, False], k)


def problems(random: np.random.Generator, count: int, mean: float) -> Floats:
    """Rates over 8 samples of problems whose difficulty varies around `mean`."""
    difficulty = random.beta(2 * mean, 2 * (1 - mean), count)
    return random.binomial(8, difficulty) / 8


def test_intervals_cover_the_truth_at_their_level() -> None:
    random = np.random.default_rng(5)
    trials = 150
    hits = [0, 0, 0]
    for seed in range(trials):
        target = [problems(random, 60, 0.3), problems(random, 40, 0.6)]
        guided = [np.clip(rates, 0, 1) for rates in (problems(random, 60, 0.45), problems(random, 40, 0.75))]
        gain = relative_gain(guided, target, seed)
        assert gain is not None
        for place, (found, truth) in enumerate(
            [(pass_at_1(target, seed), 0.45), (difference(guided, target, seed), 0.15), (gain, 0.6 / 0.45 - 1)]
        ):
            hits[place] += found.low <= truth <= found.high
    for count in hits:  # below 0.95, as for any bootstrap of few problems; standard deviation of the count 2.7
        assert 0.88 <= count / trials <= 0.995, hits


def test_tasks_have_equal_weight_and_gains_are_of_averages() -> None:
    target, guided = [np.array([0.0, 0.4]), np.full(100, 0.6)], [np.array([0.4, 0.8]), np.full(100, 0.6)]
    assert pass_at_1(target).value == pytest.approx(0.4)
    assert difference(guided, target).value == pytest.approx(0.2)
    gain = relative_gain(guided, target)
    assert gain is not None
    assert gain.value == pytest.approx(0.5)  # the mean of the tasks' gains would be 1.0
    assert gain.high > 0.5 > gain.low


def test_a_baseline_that_is_never_right_has_no_relative_gain() -> None:
    assert relative_gain([np.array([1.0, 0.0])], [np.zeros(2)]) is None
    rare = relative_gain([np.array([1.0, 1.0, 1.0])], [np.array([1.0, 0.0, 0.0])])
    assert rare is not None
    assert (rare.value, rare.high) == (2.0, math.inf)


def test_a_seed_fixes_the_interval_and_pairing_narrows_it() -> None:
    random = np.random.default_rng(2)
    hard = [random.random(50)]
    better = [np.clip(hard[0] + 0.1 + random.normal(0, 0.01, 50), None, 2)]
    assert pass_at_1(hard, 3) == pass_at_1(hard, 3) != pass_at_1(hard, 4)
    apart, alone = difference(better, hard), pass_at_1(hard)
    assert apart.high - apart.low < 0.1 * (alone.high - alone.low)


def test_few_differing_problems_are_tested_exactly() -> None:
    """Five problems, all better: 2 of the 2^5 signs are as extreme, as in the sign test."""
    ones, zeros = [np.array([1.0] * 5 + [0.5] * 20)], [np.array([0.0] * 5 + [0.5] * 20)]
    assert significance(ones, zeros) == pytest.approx(2 / 32)
    assert significance(zeros, ones) == pytest.approx(2 / 32)
    assert significance(ones, ones) == 1.0


def test_random_signs_agree_with_the_exact_test() -> None:
    parts = np.random.default_rng(8).normal(0.3, 1, 16)
    signs = np.array(list(product([-1, 1], repeat=16)))
    exact = float(np.mean(np.abs(signs @ parts) >= abs(parts.sum()) - 1e-9))
    assert significance([parts], [np.zeros(16)]) == pytest.approx(exact, abs=0.015)
    assert significance([np.ones(60)], [np.zeros(60)]) < 0.001


def test_without_a_difference_few_tests_are_significant() -> None:
    random = np.random.default_rng(4)
    ps = [significance([problems(random, 40, 0.4)], [problems(random, 40, 0.4)], seed) for seed in range(100)]
    assert sum(p < 0.05 for p in ps) <= 11  # 5 expected, standard deviation 2.2


def test_holm_raises_p_with_the_number_of_tests() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_behaviours_are_counted_as_whole_words_and_phrases() -> None:
    text = "Wait, that is wrong. Alternatively, let me double-check: verifying\\nwaiter; another  way. Checked."
    assert behaviours(text) == Behaviours(words=13, branching=2, backtracking=2, verification=3)
    assert behaviours("Try again, try\nagain: it isn’t right!").backtracking == 3
    assert behaviours("") == Behaviours()
    assert (behaviours("wait and see") + behaviours("see")).per_mille(1) == 250.0
