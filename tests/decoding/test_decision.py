"""Rows taken to tokens, against one row at a time worked out by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from actors.decoding.candidates import NONE, Ids, Lookup, Part, join
from actors.decoding.decision import Row, compare, decide
from actors.decoding.parameters import Sampling
from actors.decoding.penalties import adjust
from actors.decoding.sampling import choose

VOCABULARY = 300


def unchanged(ids: NDArray[np.int64], logits: NDArray[np.float64]) -> None:
    """No penalties."""


def parts(whole: NDArray[np.float32], k: int | None) -> tuple[Ids, list[Part]]:
    """Candidates and three parts [target, guider, guider base] of whole rows [3, V]; k None: all ids."""
    out = []
    for role, z in enumerate(whole):
        part = Part()
        mine = np.argsort(-z, kind="stable")[: k or VOCABULARY] if role < 2 else NONE
        part.arrive(np.zeros(0), mine, z[mine], float(np.logaddexp.reduce(z.astype(np.float64))))
        out.append(part)
    (ids,) = join([out])
    for part, z in zip(out, whole, strict=True):
        places = part.missing(len(ids))
        part.lookups.append(Lookup(ids[places], places, z[ids[places]]))
    return ids, out


def rows(count: int, k: int | None, sampling: Sampling, spread: float = 3.0) -> list[Row]:
    draw = np.random.default_rng(count)
    out = []
    for i in range(count):
        whole = draw.normal(0, spread, (3, VOCABULARY)).astype(np.float32)
        ids, (target, guider, base) = parts(whole, k)
        out.append(Row(ids, target, guider, base, 0.25 * (i % 7), sampling, 1_000 + i, i, unchanged))
    return out


def table(part: Part) -> NDArray[np.float64]:
    """[V] what a part of a whole row knows."""
    return part.values(VOCABULARY)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=0.7, top_p=0.9)])
def test_whole_rows_are_decided_by_the_formula(sampling: Sampling) -> None:
    many = rows(12, None, sampling)
    decisions = decide(many, guided=True)
    for i, row in enumerate(many):
        assert row.guider is not None
        assert row.guider_base is not None
        target = table(row.target)
        z = target + row.alpha * (table(row.guider) - table(row.guider_base))
        ids, seed, position = np.arange(VOCABULARY)[None], np.array([row.seed], np.uint64), np.array([i], np.uint64)
        assert decisions.tokens[i] == choose(ids, z[None], [sampling], seed, position)[0]
        assert decisions.alone[i] == choose(ids, target[None], [sampling], seed, position)[0]
    assert not decisions.stuck.any()


@pytest.mark.parametrize("k", [4, 20, None])
def test_company_changes_no_decision_and_no_bit_of_its_estimates(k: int | None) -> None:
    many = rows(9, k, Sampling(temperature=0.9, top_p=0.95))
    together = decide(many, guided=True)
    for i, row in enumerate(many):
        alone = decide([row], guided=True)
        assert alone.tokens[0] == together.tokens[i]
        assert alone.alone[0] == together.alone[i]
        assert alone.outside[0] == together.outside[i]
        assert alone.uncovered[0] == together.uncovered[i]


def test_decoding_alone_needs_no_small_models() -> None:
    many = [replace(row, guider=None, guider_base=None) for row in rows(5, None, Sampling(temperature=0))]
    decisions = decide(many, guided=False)
    assert decisions.tokens.tolist() == [int(np.argmax(table(row.target))) for row in many]
    assert decisions.alone.tolist() == decisions.tokens.tolist()


def test_alpha_zero_decides_as_the_target_alone() -> None:
    many = [replace(row, alpha=0.0) for row in rows(9, None, Sampling(temperature=1.0))]
    decisions = decide(many, guided=True)
    assert decisions.tokens.tolist() == decisions.alone.tolist()


def test_both_choices_are_made_under_the_requests_history() -> None:
    (row,) = rows(1, None, Sampling(temperature=0))
    first = decide([row], guided=True)
    banned = [int(first.tokens[0]), int(first.alone[0])]

    def ban(ids: NDArray[np.int64], logits: NDArray[np.float64]) -> None:
        adjust(ids, logits, row.sampling, (), Counter(), banned)

    second = decide([replace(row, adjust=ban)], guided=True)
    assert second.tokens[0] not in banned
    assert second.alone[0] not in banned


def test_a_row_in_which_nothing_may_be_chosen_is_stuck_and_its_neighbours_are_not() -> None:
    def ban_all(ids: NDArray[np.int64], logits: NDArray[np.float64]) -> None:
        logits[:] = -np.inf

    many = rows(3, 8, Sampling(temperature=1.0, top_p=0.9))
    free = decide(many, guided=True)
    many[1] = replace(many[1], adjust=ban_all)
    decisions = decide(many, guided=True)
    assert decisions.stuck.tolist() == [False, True, False]
    assert decisions.tokens[[0, 2]].tolist() == free.tokens[[0, 2]].tolist()
    assert decisions.outside[1] == 1


def test_slices_held_against_whole_rows_lose_what_they_did_not_see() -> None:
    flat = 0.5
    many, whole = rows(6, 20, Sampling(), flat), rows(6, None, Sampling(), flat)
    sliced, complete = decide(many, guided=True), decide(whole, guided=True)
    distance, differs = compare(many, sliced, complete)
    for i in range(6):
        p = np.exp(complete.logits[i] - complete.logits[i].max())
        p /= p.sum()
        inside = sliced.dense.ids[i][sliced.dense.inside[i]]
        assert distance[i] == pytest.approx(1 - p[inside].sum())  # the candidates' own proportions are right
    assert differs.tolist() == (sliced.tokens != complete.tokens).tolist()


def test_slices_that_see_everything_differ_in_nothing() -> None:
    many = rows(4, None, Sampling())
    once, again = decide(many, guided=True), decide(many, guided=True)
    distance, differs = compare(many, once, again)
    assert distance.tolist() == [0] * 4
    assert not differs.any()
