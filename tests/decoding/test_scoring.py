"""Log-probabilities of candidates, compared with those computed from full rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from actors.decoding import kernels
from actors.decoding.candidates import RowSlice
from actors.decoding.prompt import prompt_notes, spread
from actors.decoding.scoring import combined_logprobs, likeliest, scores_of
from actors.decoding.vocabulary import NO_REQUIRED_LOGITS, RequiredLogits
from tests.decoding.formulas import Floats, RoleLogits
from tests.decoding.test_arithmetic import covered, logsumexp, whole_rows

ALPHA = np.array([0.8, 1.4])


def trio() -> tuple[Floats, Floats, Floats]:
    target, guider, base = (whole_rows(2, seed) for seed in (1, 2, 3))
    return target, guider, base


def rows_of(places: np.ndarray) -> list[RoleLogits]:
    return [covered(rows, places) for rows in trio()]


def columns(models: Sequence[RoleLogits]) -> tuple[Floats, Floats]:
    """Logits [R, B, W] and logsumexp [R, B] of models."""
    return np.stack([each.logits for each in models]), np.stack([each.logsumexp for each in models])


def log_total(*models: RoleLogits) -> Floats:
    """Log of the sum of exp(combined) over each row's whole vocabulary, at alpha 1."""
    logits, sums = columns(models)
    rule, (_, rows, width) = kernels.GUIDED if len(models) > 1 else kernels.ALONE, logits.shape
    return np.array([kernels.log_total(rule, logits, row, width, sums, 1.0, np.empty(width)) for row in range(rows)])


def expected() -> Floats:
    target, guider, base = trio()
    z = target + ALPHA[:, None] * (guider - base)
    return np.asarray(z - logsumexp(z)[:, None])


def test_whole_rows_give_the_log_softmax_of_the_formula() -> None:
    logits, sums = columns(rows_of(np.arange(400)))
    ids, counts = np.tile(np.arange(400), (2, 1)), np.full(2, 400)
    for row, logprobs in enumerate(expected()):
        alpha = float(ALPHA[row])
        scores = scores_of(ids, counts, logits, sums, row, kernels.GUIDED, alpha, 7, 400, 3)
        np.testing.assert_allclose(
            combined_logprobs(logits, sums, row, 400, kernels.GUIDED, alpha), logprobs, atol=1e-6
        )
        assert scores.logprob == pytest.approx(logprobs[7], abs=1e-6)
        own = trio()[0][row] - logsumexp(trio()[0])[row]
        assert scores.shift == pytest.approx(logprobs[7] - own[7], abs=1e-6)
        np.testing.assert_allclose([value for _, value in scores.guided], np.sort(logprobs)[::-1], atol=1e-6)
        assert [id_ for id_, _ in scores.target] == np.argsort(-own)[:3].tolist()
        assert len(scores.guider) == 3


def test_mass_outside_the_candidates_is_scaled_by_the_small_models() -> None:
    target = np.log(np.array([[0.6, 0.3, 0.05, 0.05]]))
    guider = np.log(np.array([[0.4, 0.4, 0.10, 0.10]]))
    base = np.log(np.array([[0.5, 0.3, 0.10, 0.10]]))
    whole = np.asarray(target + guider - base)
    a, b, c = (covered(rows, np.array([0, 1])) for rows in (target, guider, base))
    total = log_total(a, b, c)
    np.testing.assert_allclose(total, logsumexp(whole), atol=1e-12)


def test_candidates_beyond_a_small_models_mass_use_the_lowest_quarter() -> None:
    """Events of another vocabulary may overlap. Then the mass that they leave over means nothing."""
    target = np.log(np.array([[0.5, 0.2, 0.1, 0.2]]))
    guider = np.log(np.array([[0.8, 0.2, 0.1, 0.05]]))
    base = np.log(np.array([[0.7, 0.3, 0.2, 0.1]]))
    whole = np.asarray(target + guider - base)
    ids = np.array([0, 1, 2])
    a, b, c = (RoleLogits(rows[:, ids], np.ones((1, 3), bool), np.zeros(1)) for rows in (target, guider, base))
    assert np.all(b.uncovered < 0)
    total = log_total(a, b, c)
    np.testing.assert_allclose(total, logsumexp(whole), atol=1e-12)  # the ids 2 and 3 are halved alike


def test_of_one_model_alone_the_total_is_exact_whatever_the_candidates() -> None:
    target = trio()[0]
    required = covered(target, np.arange(3))
    np.testing.assert_array_equal(log_total(required), logsumexp(target))


def test_candidates_of_one_probability_stand_by_their_ids() -> None:
    logprobs = np.array([-2.0, -1.0, -2.0, np.nan, -2.0, -np.inf])
    ids = np.array([3, 5, 8, 9, 12, 1 << 32])
    assert likeliest(ids, logprobs, 3) == ((5, -1.0), (3, -2.0), (8, -2.0))
    assert likeliest(ids, logprobs, 20) == ((5, -1.0), (3, -2.0), (8, -2.0), (12, -2.0))
    assert likeliest(ids, logprobs, 0) == ()


def test_a_whole_row_is_spread_over_the_primarys_ids_with_its_events() -> None:
    required = RequiredLogits(np.zeros(2, np.int32), np.zeros(1, np.int64), np.array([4]))
    part = RowSlice(np.array([2, -1, 4, 0]), np.array([0.2, 9.0, 0.4, 0.0]), np.array([0.5]), 1.0)
    rows = spread([part], required, 6)
    logits, sums = rows
    np.testing.assert_array_equal(logits, [[0.0, np.nan, 0.2, np.nan, 0.5, np.nan]])
    assert sums.tolist() == [1.0]


def test_a_prompts_token_is_ranked_among_the_whole_vocabulary() -> None:
    z = np.log(np.array([0.2, 0.5, 0.3]))
    rows = spread([RowSlice(np.arange(3), z, np.zeros(0), 0.0)], NO_REQUIRED_LOGITS, 4)
    (note,) = prompt_notes({"target": rows}, 0.0, [2], [2], 1)
    assert (note.id, note.rank, [id_ for id_, _ in note.guided]) == (2, 2, [1])
    assert note.logprob == pytest.approx(np.log(0.3))
    assert note.guided[0][1] == pytest.approx(np.log(0.5))
    (nowhere,) = prompt_notes({"target": rows}, 0.0, [3], [3], 0)
    assert (nowhere.logprob, nowhere.rank) == (-np.inf, 4)
