"""The guidance formula over candidates, and the estimates of the mass outside of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.decoding.formulas import (
    Floats,
    RoleLogits,
    bounds_of_one_model,
    combine,
    outside_mass,
    total_variation,
)

WIDTH = 400


def logsumexp(z: Floats) -> Floats:
    top = z.max(-1, keepdims=True)
    return np.asarray((top + np.log(np.exp(z - top).sum(-1, keepdims=True)))[..., 0])


def whole_rows(count: int, seed: int, spread: float = 3.0) -> Floats:
    return np.random.default_rng(seed).normal(0, spread, (count, WIDTH))


def covered(rows: Floats, places: np.ndarray) -> RoleLogits:
    """Full rows [B, V] with candidates at `places` only."""
    return real(rows[:, places], logsumexp(rows))


def real(logits: Floats, logsumexp: Floats) -> RoleLogits:
    """Rows without padding."""
    return RoleLogits(logits, np.ones(logits.shape, np.bool_), logsumexp)


def combined_of(rows: list[RoleLogits], alpha: Floats) -> Floats:
    target, guider, base = rows
    return combine(target, guider, base, alpha)


def test_combining_is_the_published_formula() -> None:
    target, guider, base = (whole_rows(3, seed) for seed in (1, 2, 3))
    alpha, everything = np.array([0.0, 0.5, 1.5]), np.arange(WIDTH)
    combined = combine(covered(target, everything), covered(guider, everything), covered(base, everything), alpha)
    np.testing.assert_array_equal(combined, target + alpha[:, None] * (guider - base))


def test_padding_is_minus_infinity() -> None:
    inside = np.array([[True, True, False, True]])
    rows = replace(covered(whole_rows(1, 1), np.arange(4)), inside=inside)
    assert np.isneginf(combine(rows, rows, rows, np.ones(1))).tolist() == [[False, False, True, False]]


@pytest.mark.parametrize("silent", ["guider", "guider_base", "both"])
def test_an_unmapped_id_gets_no_guidance_on_log_probabilities(silent: str) -> None:
    target, guider, base = (whole_rows(2, seed) for seed in (4, 5, 6))
    alpha, places = np.array([1.0, -0.7]), np.arange(WIDTH)
    small = [covered(guider, places), covered(base, places)]
    if silent != "guider_base":
        small[0].logits[:, 7] = np.nan
    if silent != "guider":
        small[1].logits[:, 7] = np.nan
    combined = combine(covered(target, places), small[0], small[1], alpha)
    # In log-probabilities, which differ by a constant of the row, id 7 moves by 0.
    log_probabilities = (z - logsumexp(z)[:, None] for z in (target, guider, base))
    t, g, b = log_probabilities
    delta = g - b
    delta[:, 7] = 0.0
    expected = t + alpha[:, None] * delta
    shift = combined - expected
    np.testing.assert_allclose(shift, np.repeat(shift[:, :1], WIDTH, 1), atol=1e-12)


def test_uncovered_mass_is_exactly_what_is_missing() -> None:
    rows, places = whole_rows(5, 7), np.arange(0, WIDTH, 9)
    known = covered(rows, places)
    probability = np.exp(rows - logsumexp(rows)[:, None])
    np.testing.assert_allclose(known.uncovered, 1 - probability[:, places].sum(1), atol=1e-12)


def test_ids_that_a_model_lacks_cover_nothing() -> None:
    rows = covered(whole_rows(1, 8), np.arange(3))
    rows.logits[0, 1] = np.nan
    assert rows.uncovered[0] == real(rows.logits[:, [0, 2]], rows.logsumexp).uncovered[0]


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 1.4])
def test_padding_and_other_rows_change_no_bit_of_the_estimates(temperature: float) -> None:
    rows = [whole_rows(4, seed) for seed in (1, 2, 3)]
    places, alpha = np.arange(33), np.full(4, 0.8)
    narrow = [covered(z, places) for z in rows]
    wide = [padded(known, 50) for known in narrow]
    for thin, thick in zip(narrow, wide, strict=True):
        assert thin.uncovered.tobytes() == thick.uncovered.tobytes()
    combined, combined_wide = combined_of(narrow, alpha), combined_of(wide, alpha)
    assert combined_wide[:, :33].tobytes() == combined.tobytes()
    known_rows = at(rows[0], temperature, 1.0)
    estimate = outside_estimate(combined, alpha, *narrow, **known_rows)
    assert outside_estimate(combined_wide, alpha, *wide, **known_rows).tobytes() == estimate.tobytes()
    for row in range(4):
        one = slice(row, row + 1)
        alone = [real(known.logits[one], known.logsumexp[one]) for known in narrow]
        part = {name: values[one] for name, values in known_rows.items()}
        assert outside_estimate(combined[one], alpha[one], *alone, **part)[0] == estimate[row]


def at(rows: Floats, temperature: float = 1.0, ceiling: float | Floats = np.inf) -> dict[str, Any]:
    """Temperature, logsumexp and ceiling of the target's whole rows [B, V]."""
    count = len(rows)
    return {
        "temperature": np.full(count, temperature),
        "tempered": logsumexp(rows / (temperature or 1.0)),
        "ceiling": np.broadcast_to(np.asarray(ceiling, np.float64), count),
    }


def outside_estimate(combined: Floats, alpha: Floats, *models: RoleLogits, **known: Any) -> Floats:
    """The estimated mass [B] outside the candidates."""
    return outside_mass(alpha, *models, **known).share(combined)


def padded(rows: RoleLogits, by: int) -> RoleLogits:
    """The same rows with padding, NaN there."""
    around = ((0, 0), (0, by))
    logits = np.pad(rows.logits, around, constant_values=np.nan)
    return RoleLogits(logits, np.pad(rows.inside, around), rows.logsumexp)


def test_nothing_is_outside_when_everything_is_covered() -> None:
    rows = [covered(whole_rows(4, seed), np.arange(WIDTH)) for seed in (1, 2, 3)]
    alpha, known = np.full(4, 1.0), at(whole_rows(4, 1))
    assert (outside_estimate(combined_of(rows, alpha), alpha, *rows, **known) < 1e-3).all()
    assert (outside_estimate(rows[0].logits, alpha, rows[0], **known) < 1e-6).all()


def outside_truth(z: Floats, places: np.ndarray, temperature: float = 1.0) -> Floats:
    """[B]: mass of softmax(z / temperature) outside the places, from full rows [B, V]."""
    z = z / temperature
    return np.asarray(1 - np.exp(z[:, places] - logsumexp(z)[:, None]).sum(1))


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.5, 4.0])
def test_for_the_target_alone_the_estimate_is_the_truth(temperature: float) -> None:
    rows, places = whole_rows(6, 9), np.arange(0, WIDTH, 5)
    known = covered(rows, places)
    estimate = outside_estimate(known.logits, np.zeros(6), known, **at(rows, temperature))
    np.testing.assert_allclose(estimate, outside_truth(rows, places, temperature), rtol=1e-9)


def test_below_a_floor_of_the_temperature_the_estimate_bounds_the_truth() -> None:
    rows = np.sort(whole_rows(5, 14))[:, ::-1]
    places, known = np.arange(30), covered(rows, np.arange(30))
    estimates = [
        outside_estimate(known.logits, np.zeros(5), known, **at(rows, t, rows[:, 29])) for t in (0.0, 0.2, 0.3, 1.0)
    ]
    greedy, cold, floor, warm = estimates
    assert (floor < warm).all()
    assert greedy.tolist() == cold.tolist()
    assert (cold >= outside_truth(rows, places, 0.3) - 1e-9).all()


@pytest.mark.parametrize("temperature", [0.2, 0.6, 1.0, 1.5])
def test_bounds_of_one_model_hold_and_are_as_narrow_as_float32(temperature: float) -> None:
    rows = np.sort(whole_rows(6, 13))[:, ::-1]
    known = covered(rows, np.arange(40))
    truth = logsumexp(rows[:, 40:] / temperature)
    for adjusted in (False, True):
        facts = at(rows, temperature, rows[:, 39])
        mass = outside_mass(np.zeros(6), known, **facts)
        bounds = bounds_of_one_model(mass, facts["temperature"], facts["ceiling"], np.full(6, adjusted))
        assert (bounds.ceiling >= rows[:, 40]).all()
        assert (bounds.least <= truth).all()
        assert (bounds.most >= truth).all()
        assert np.isneginf(bounds.least).all() == (adjusted or temperature < 0.6)
        total = facts["tempered"]
        widest = 1e-7 if not adjusted else 1.0
        assert (np.exp(bounds.most - total) - np.exp(bounds.least - total) <= 1e-5 + widest).all()


@pytest.mark.parametrize("level", [-1_000.0, 1_000.0])
def test_bounds_allow_for_the_float32_of_a_row_of_any_level(level: float) -> None:
    rows = np.zeros((200, WIDTH)) + level + np.linspace(0, 1e-3, 200)[:, None]  # GPT-2's logits are negative
    facts = at(rows, 0.6, rows[:, 0])
    facts["tempered"] = facts["tempered"].astype(np.float32).astype(np.float64)
    mass = outside_mass(np.zeros(200), covered(rows, np.arange(40)), **facts)
    bounds = bounds_of_one_model(mass, facts["temperature"], facts["ceiling"], np.zeros(200, np.bool_))
    truth = logsumexp(rows[:, 40:] / 0.6)
    assert (bounds.least <= truth).all()
    assert (bounds.most >= truth).all()


def test_the_estimate_bounds_rows_that_the_guider_lifts_outside() -> None:
    target, base = whole_rows(4, 15), whole_rows(4, 16)
    guider = base.copy()
    guider[:, :10] -= 3.0  # the candidates, pushed down
    guider[:, 10:] += 1.0
    alpha, places = np.full(4, 1.0), np.arange(50)
    rows = [covered(z, places) for z in (target, guider, base)]
    guided = outside_estimate(combined_of(rows, alpha), alpha, *rows, **at(target))
    assert (guided >= outside_truth(target + guider - base, places) - 1e-9).all()


@pytest.mark.parametrize("shift", [-2.0, 0.0, 0.7])
def test_the_estimate_bounds_the_truth_if_guidance_shifts_all_outside(shift: float) -> None:
    target, base = whole_rows(3, 10), whole_rows(3, 11)
    places, alpha = np.arange(50), np.array([0.5, 1.0, 1.5])
    guider = base + shift  # outside, the delta is the same everywhere
    guider[:, places] = whole_rows(3, 12)[:, places]
    z = target + alpha[:, None] * (guider - base)
    known = [covered(rows, places) for rows in (target, guider, base)]
    estimate = outside_estimate(z[:, places], alpha, *known, **at(target))
    assert (estimate >= outside_truth(z, places) - 1e-9).all()


def test_the_estimate_stays_a_probability_in_extreme_rows() -> None:
    rows = real(np.array([[5_000.0, -5_000.0]]), np.array([5_000.0]))
    for strength in (-50.0, 50.0):
        alpha = np.array([strength])
        for temperature in (0.0, 1.0, 100.0):
            combined = combine(rows, rows, rows, alpha)
            known = at(rows.logits, temperature)
            estimate = outside_estimate(combined, alpha, rows, rows, rows, **known)
            assert 0 <= estimate[0] <= 1


def test_without_logits_of_a_role_all_its_mass_is_outside() -> None:
    target, nothing = covered(whole_rows(1, 1), np.arange(4)), real(np.full((1, 4), np.nan), np.zeros(1))
    alpha = np.ones(1)
    combined = combine(target, nothing, nothing, alpha)
    estimate = outside_estimate(combined, alpha, target, nothing, nothing, **at(whole_rows(1, 1)))
    assert nothing.uncovered.tolist() == [1.0]
    np.testing.assert_allclose(estimate, target.uncovered)


def test_total_variation_of_known_distributions() -> None:
    p, q = np.log(np.array([[0.5, 0.3, 0.2]])), np.log(np.array([[0.2, 0.3, 0.5]]))
    one = np.ones(1)
    assert total_variation(p, q, one)[0] == pytest.approx(0.3)
    assert total_variation(p, p + 4, one)[0] == pytest.approx(0.0)
    gone = np.array([[0.0, -np.inf, -np.inf]])
    assert total_variation(p, gone, one)[0] == pytest.approx(0.5)
    assert total_variation(p, q, np.array([100.0]))[0] < 0.01
