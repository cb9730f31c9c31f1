"""The formula over candidates, and the two estimates of what is not among them."""

from __future__ import annotations

import numpy as np
import pytest

from actors.decoding.arithmetic import Floats, RoleRows, combine, outside_estimate, total_variation

WIDTH = 400


def logsumexp(z: Floats) -> Floats:
    top = z.max(-1, keepdims=True)
    return np.asarray((top + np.log(np.exp(z - top).sum(-1, keepdims=True)))[..., 0])


def whole_rows(count: int, seed: int, spread: float = 3.0) -> Floats:
    return np.random.default_rng(seed).normal(0, spread, (count, WIDTH))


def covered(rows: Floats, places: np.ndarray) -> RoleRows:
    """What is known of whole rows [B, V] when only `places` were asked for."""
    return RoleRows(rows[:, places], logsumexp(rows))


def combined_of(rows: list[RoleRows], alpha: Floats, inside: np.ndarray) -> Floats:
    target, guider, base = rows
    return combine(target, guider, base, alpha, inside)


def test_combining_is_the_published_formula() -> None:
    target, guider, base = (whole_rows(3, seed) for seed in (1, 2, 3))
    alpha, everything = np.array([0.0, 0.5, 1.5]), np.arange(WIDTH)
    inside = np.ones((3, WIDTH), np.bool_)
    combined = combine(
        covered(target, everything), covered(guider, everything), covered(base, everything), alpha, inside
    )
    np.testing.assert_array_equal(combined, target + alpha[:, None] * (guider - base))


def test_padding_is_minus_infinity() -> None:
    rows = covered(whole_rows(1, 1), np.arange(4))
    inside = np.array([[True, True, False, True]])
    assert np.isneginf(combine(rows, rows, rows, np.ones(1), inside)).tolist() == [[False, False, True, False]]


@pytest.mark.parametrize("silent", ["guider", "guider_base", "both"])
def test_an_unmapped_id_is_moved_by_nothing_on_log_probabilities(silent: str) -> None:
    target, guider, base = (whole_rows(2, seed) for seed in (4, 5, 6))
    alpha, places = np.array([1.0, -0.7]), np.arange(WIDTH)
    small = [covered(guider, places), covered(base, places)]
    if silent != "guider_base":
        small[0].logits[:, 7] = np.nan
    if silent != "guider":
        small[1].logits[:, 7] = np.nan
    combined = combine(covered(target, places), small[0], small[1], alpha, np.ones((2, WIDTH), np.bool_))
    # The same in log-probabilities differs by a constant of the row; there, id 7 moves by 0.
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
    np.testing.assert_allclose(
        known.uncovered(np.ones((5, len(places)), np.bool_)), 1 - probability[:, places].sum(1), atol=1e-12
    )


def test_ids_that_a_model_lacks_cover_nothing() -> None:
    rows = covered(whole_rows(1, 8), np.arange(3))
    rows.logits[0, 1] = np.nan
    inside = np.ones((1, 3), np.bool_)
    without = RoleRows(rows.logits[:, [0, 2]], rows.logsumexp)
    assert rows.uncovered(inside)[0] == without.uncovered(np.ones((1, 2), np.bool_))[0]


def test_padding_changes_no_bit_of_the_uncovered_mass_nor_of_the_estimate() -> None:
    rows = [whole_rows(4, seed) for seed in (1, 2, 3)]
    places, alpha = np.arange(33), np.full(4, 0.8)
    narrow = [covered(z, places) for z in rows]
    wide = [RoleRows(np.pad(r.logits, ((0, 0), (0, 50)), constant_values=np.nan), r.logsumexp) for r in narrow]
    inside = np.ones((4, 33), np.bool_)
    padded = np.pad(inside, ((0, 0), (0, 50)))
    for thin, thick in zip(narrow, wide, strict=True):
        assert thin.uncovered(inside).tobytes() == thick.uncovered(padded).tobytes()
    combined, combined_wide = combined_of(narrow, alpha, inside), combined_of(wide, alpha, padded)
    assert combined_wide[:, :33].tobytes() == combined.tobytes()
    estimate = outside_estimate(combined, inside, alpha, *narrow)
    assert outside_estimate(combined_wide, padded, alpha, *wide).tobytes() == estimate.tobytes()
    for row in range(4):
        one = slice(row, row + 1)
        alone = [RoleRows(r.logits[one], r.logsumexp[one]) for r in narrow]
        assert outside_estimate(combined[one], inside[one], alpha[one], *alone)[0] == estimate[row]


def test_nothing_is_outside_when_everything_is_covered() -> None:
    rows = [covered(whole_rows(4, seed), np.arange(WIDTH)) for seed in (1, 2, 3)]
    inside, alpha = np.ones((4, WIDTH), np.bool_), np.full(4, 1.0)
    assert (outside_estimate(combined_of(rows, alpha, inside), inside, alpha, *rows) < 1e-3).all()
    assert (outside_estimate(rows[0].logits, inside, alpha, rows[0]) < 1e-6).all()


def test_for_the_target_alone_the_estimate_is_the_truth() -> None:
    rows = whole_rows(6, 9)
    places = np.arange(0, WIDTH, 5)
    inside, known = np.ones((6, len(places)), np.bool_), covered(rows, places)
    estimate = outside_estimate(known.logits, inside, np.zeros(6), known)
    np.testing.assert_allclose(estimate, known.uncovered(inside), rtol=1e-9)


@pytest.mark.parametrize("shift", [-2.0, 0.0, 0.7])
def test_the_estimate_is_never_below_the_truth_where_guidance_shifts_all_outside_alike(shift: float) -> None:
    target, base = whole_rows(3, 10), whole_rows(3, 11)
    places, alpha = np.arange(50), np.array([0.5, 1.0, 1.5])
    guider = base + shift  # outside, the delta is the same everywhere
    guider[:, places] = whole_rows(3, 12)[:, places]
    z = target + alpha[:, None] * (guider - base)
    truth = 1 - np.exp(z[:, places] - logsumexp(z)[:, None]).sum(1)
    inside = np.ones((3, 50), np.bool_)
    known = [covered(rows, places) for rows in (target, guider, base)]
    assert (outside_estimate(z[:, places], inside, alpha, *known) >= truth - 1e-9).all()


def test_the_estimate_stays_a_probability_in_extreme_rows() -> None:
    rows = RoleRows(np.array([[5_000.0, -5_000.0]]), np.array([5_000.0]))
    for alpha in (-50.0, 50.0):
        inside = np.ones((1, 2), np.bool_)
        estimate = outside_estimate(
            combine(rows, rows, rows, np.array([alpha]), inside), inside, np.array([alpha]), rows
        )
        assert 0 <= estimate[0] <= 1


def test_total_variation_of_known_distributions() -> None:
    p, q = np.log(np.array([[0.5, 0.3, 0.2]])), np.log(np.array([[0.2, 0.3, 0.5]]))
    one = np.ones(1)
    assert total_variation(p, q, one)[0] == pytest.approx(0.3)
    assert total_variation(p, p + 4, one)[0] == pytest.approx(0.0)
    gone = np.array([[0.0, -np.inf, -np.inf]])
    assert total_variation(p, gone, one)[0] == pytest.approx(0.5)
    assert total_variation(p, q, np.array([100.0]))[0] < 0.01
