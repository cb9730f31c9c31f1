"""Decisions of many rows, compared with one row at a time computed directly."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from actors.api.generation import ROLES, Role
from actors.api.sampling_params import Sampling
from actors.decoding.candidates import BlockLayout, CandidateBlock
from actors.decoding.decision import Decisions, choose, compare
from actors.decoding.penalties import adjustments
from actors.decoding.vocabulary import RequiredLogits
from tests.decoding.compiled import RowSamplingSpec, decide_rows

VOCABULARY = 300
NOTHING = RequiredLogits(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64))
Rows = list[tuple[NDArray[np.float32], RowSamplingSpec]]


def block_of(rows: Rows, k: int | None, roles: tuple[Role, ...] = ROLES) -> CandidateBlock:
    """A block of full rows [3, V] with top-k slices; k None: all ids."""
    widths = {role: 0 if role == "guider_base" else k or VOCABULARY for role in roles}
    block = CandidateBlock(len(rows), BlockLayout(dict.fromkeys(roles, NOTHING), widths))
    every = np.arange(len(rows))
    for number, role in enumerate(roles):
        logits = np.stack([whole[number] for whole, _ in rows])
        at = np.sort(np.argsort(-logits, axis=1, kind="stable")[:, : widths[role]], axis=1)
        heats = np.array([[1.0, spec.sampling.temperature or 1.0] for _, spec in rows])
        sums = np.logaddexp.reduce(logits.astype(np.float64)[:, None] / heats[:, :, None], axis=2).astype(np.float32)
        block.store(role, every, at, np.take_along_axis(logits, at, 1), np.zeros((len(rows), 0)), *sums.T)
    block.merge(every)
    for number, role in enumerate(roles):
        missing = block.missing_logits(role, every, np.arange(VOCABULARY))
        whole = np.stack([whole[number] for whole, _ in rows])[np.repeat(missing.rows, missing.counts), missing.ids]
        block.fill(role, missing.rows, missing.counts, missing.places, whole)
    return block


def decided(rows: Rows, k: int | None, guided: bool = True) -> Decisions:
    """Decide all rows of a block."""
    roles: tuple[Role, ...] = ROLES if guided else ("target",)
    specs = [spec for _, spec in rows]
    return decide_rows(block_of(rows, k, roles), range(len(rows)), specs, guided)


def rows(count: int, sampling: Sampling, spread: float = 3.0) -> Rows:
    draw = np.random.default_rng(count)
    return [
        (
            draw.normal(0, spread, (3, VOCABULARY)).astype(np.float32),
            RowSamplingSpec(0.25 * (i % 7), sampling, 1_000 + i, i, None),
        )
        for i in range(count)
    ]


def changed(
    row: tuple[NDArray[np.float32], RowSamplingSpec], **changes: Any
) -> tuple[NDArray[np.float32], RowSamplingSpec]:
    return row[0], replace(row[1], **changes)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=0.7, top_p=0.9)])
def test_whole_rows_are_decided_by_the_formula(sampling: Sampling) -> None:
    many = rows(12, sampling)
    decisions = decided(many, None)
    for i, (whole, spec) in enumerate(many):
        target, guider, base = whole.astype(np.float64)
        z = target + spec.alpha * (guider - base)
        ids, seed, position = (
            np.arange(VOCABULARY)[None],
            np.array([spec.seed], np.uint64),
            np.array([i], np.uint64),
        )
        assert decisions.tokens[i] == choose(ids, z[None], [sampling], seed, position)[0]
        assert decisions.target_tokens[i] == choose(ids, target[None], [sampling], seed, position)[0]
    assert not decisions.no_legal_token.any()


@pytest.mark.parametrize("k", [4, 20, None])
def test_other_rows_change_no_decision_and_no_bit_of_its_estimates(k: int | None) -> None:
    many = rows(9, Sampling(temperature=0.9, top_p=0.95))
    together = decided(many, k)
    for i, row in enumerate(many):
        alone = decided([row], k)
        assert alone.tokens[0] == together.tokens[i]
        assert alone.target_tokens[0] == together.target_tokens[i]
        assert alone.outside[0] == together.outside[i]
        assert alone.uncovered[0] == together.uncovered[i]


def test_some_rows_of_a_block_are_decided_as_all_of_them_are() -> None:
    many = rows(7, Sampling(temperature=1.0))
    block, specs = block_of(many, 20), [spec for _, spec in many]
    whole = decide_rows(block, range(7), specs, guided=True)
    some = decide_rows(block, [5, 2], [specs[5], specs[2]], guided=True)
    assert some.tokens.tolist() == whole.tokens[[5, 2]].tolist()
    assert some.outside.tobytes() == whole.outside[[5, 2]].tobytes()
    assert whole.row(3).tokens.tolist() == [whole.tokens[3]]


def test_decoding_alone_needs_no_small_models() -> None:
    many = rows(5, Sampling(temperature=0))
    decisions = decided(many, None, guided=False)
    assert decisions.tokens.tolist() == [int(np.argmax(whole[0])) for whole, _ in many]
    assert decisions.target_tokens.tolist() == decisions.tokens.tolist()


def test_alpha_zero_decides_as_the_target_alone() -> None:
    decisions = decided([changed(row, alpha=0.0) for row in rows(9, Sampling(temperature=1.0))], None)
    assert decisions.tokens.tolist() == decisions.target_tokens.tolist()


def test_penalties_apply_to_both_choices() -> None:
    (row,) = rows(1, Sampling(temperature=0))
    first = decided([row], None)
    banned = [int(first.tokens[0]), int(first.target_tokens[0])]
    second = decided([changed(row, adjustments=adjustments(row[1].sampling, (), {}, banned))], None)
    assert second.tokens[0] not in banned
    assert second.target_tokens[0] not in banned


def test_a_row_without_a_legal_token_leaves_other_rows_alone() -> None:
    all_banned = adjustments(Sampling(), (), {}, range(VOCABULARY))
    many = rows(3, Sampling(temperature=1.0, top_p=0.9))
    free = decided(many, 8)
    many[1] = changed(many[1], adjustments=all_banned)
    decisions = decided(many, 8)
    assert decisions.no_legal_token.tolist() == [False, True, False]
    assert decisions.tokens[[0, 2]].tolist() == free.tokens[[0, 2]].tolist()
    assert decisions.outside[1] == 1


def test_slices_differ_from_full_rows_by_the_mass_outside() -> None:
    many = rows(6, Sampling(), spread=0.5)
    sliced, complete = decided(many, 20), decided(many, None)
    for i in range(6):
        distance, differs = compare(sliced.row(i), complete.row(i), Sampling())
        p = np.exp(complete.filtered[i] - complete.filtered[i].max())
        p /= p.sum()
        inside = sliced.ids[i, : sliced.counts[i]]
        assert distance == pytest.approx(1 - p[inside].sum())  # the proportions among the candidates are equal
        assert differs == (sliced.tokens[i] != complete.tokens[i])


def test_slices_of_all_ids_equal_full_rows() -> None:
    many = rows(4, Sampling())
    once, again = decided(many, None), decided(many, None)
    assert [compare(once.row(i), again.row(i), Sampling()) for i in range(4)] == [(0.0, False)] * 4


FILTERS = [
    Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    for temperature, top_p, top_k, min_p in itertools.product(
        (0.0, 0.2, 0.6, 1.0, 1.4), (1.0, 0.95, 0.5), (0, 3, 200), (0.0, 0.1)
    )
]


@pytest.mark.parametrize("spread", [1.0, 3.0, 6.0])
def test_settled_rows_of_one_model_draw_as_whole_rows_do(spread: float) -> None:
    settled = 0
    for sampling in FILTERS:
        many = rows(8, sampling, spread)
        sliced, whole = decided(many, 40, guided=False), decided(many, None, guided=False)
        for i in np.flatnonzero(sliced.settled).tolist():
            distance, differs = compare(sliced.row(i), whole.row(i), sampling)
            assert distance == pytest.approx(0.0, abs=1e-9)
            assert not differs
        settled += int(np.count_nonzero(sliced.settled))
    assert settled > 8 * len(FILTERS) // 3


def test_a_row_of_one_model_is_settled_if_its_nucleus_fits_at_temperature_one() -> None:
    sampling = Sampling(temperature=1.0, top_p=0.95)
    many = [row for spread in (2.0, 3.0, 4.0) for row in rows(20, sampling, spread)]
    sliced, whole = decided(many, 40, guided=False), decided(many, None, guided=False)
    fits = np.isfinite(whole.filtered).sum(1) < 40
    assert sliced.settled.tolist() == fits.tolist()
    assert 10 < fits.sum() < 40


@pytest.mark.parametrize(
    ("sampling", "settled"),
    [
        (Sampling(temperature=0.0), True),
        (Sampling(temperature=1.0, top_k=7), True),
        (Sampling(temperature=1.0, top_k=8), False),  # the eighth may tie with an id outside
        (Sampling(temperature=1.0, min_p=0.6), True),
        (Sampling(temperature=1.0, min_p=0.4), False),
        (Sampling(temperature=1.0, top_p=0.3), True),
        (Sampling(temperature=1.0, top_p=0.9), False),
        (Sampling(temperature=1.0, top_p=0.9, top_k=7), True),  # top_p takes its share of what top_k keeps
        (Sampling(temperature=1.0), False),
    ],
)
def test_filters_decide_whether_a_flat_row_needs_ids_outside(sampling: Sampling, settled: bool) -> None:
    """Eight candidates of weights 1 to .5, and 292 ids outside whose weights are .4 to .5."""
    z = np.log(np.concatenate([np.linspace(1.0, 0.5, 8), np.linspace(0.5, 0.4, VOCABULARY - 8)])).astype(np.float32)
    row = (np.stack([z, z, z]), RowSamplingSpec(0.0, sampling, 1, 1, None))
    if sampling.top_p == 0.3:  # a steep row instead
        row[0][0][0] = np.log(200.0)
    decisions = decided([row], 8, guided=False)
    assert decisions.settled.tolist() == [settled]


def test_penalties_do_not_settle_a_nucleus_whose_whole_mass_is_unknown() -> None:
    sampling = Sampling(temperature=1.0, top_p=0.95)
    plain = rows(20, sampling, 3.0)
    lowered = [changed(row, adjustments=adjustments(sampling, (), {})) for row in plain]
    before, after = decided(plain, 40, guided=False).settled, decided(lowered, 40, guided=False).settled
    assert not (after & ~before).any()
    assert after.sum() < before.sum()


def test_company_changes_no_bit_of_what_is_kept_and_settled() -> None:
    many = rows(9, Sampling(temperature=0.9, top_p=0.95))
    for guided in (False, True):
        together = decided(many, 20, guided)
        for i, row in enumerate(many):
            alone = decided([row], 20, guided)
            assert alone.settled[0] == together.settled[i]
            count = int(alone.counts[0])
            assert alone.filtered[0, :count].tobytes() == together.filtered[i, :count].tobytes()
