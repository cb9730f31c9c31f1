"""Candidates and each role's logits at them, compared with sets by brute force."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from actors.api.generation import Role
from actors.decoding.candidates import PADDING, CandidateBlock, RowProposal, RowSlice, group_into_blocks
from actors.decoding.vocabulary import RequiredLogits

IDS = 200
EVERY_ID = np.arange(IDS)


def needed(events: list[int]) -> RequiredLogits:
    """Required logits of single ids."""
    return RequiredLogits(np.array(events, np.int32), np.arange(len(events)), np.array(events, np.int64))


def part(draw: np.random.Generator, k: int, events: int) -> RowSlice:
    """A slice of k ids, a fifth of them without a counterpart."""
    ids = draw.choice(IDS, k, replace=False)
    ids = np.where(draw.random(k) < 0.2, -1, np.sort(ids))
    return RowSlice(ids, draw.normal(size=k).astype(np.float32), draw.normal(size=events), float(draw.normal()))


def guided(draw: np.random.Generator, with_base: bool) -> RowProposal:
    """A row with the answers of target and guider, and optionally of the base."""
    k, events = int(draw.integers(1, 12)), int(draw.integers(1, 3))
    chosen = draw.choice(IDS, events, replace=False).tolist()
    slices: dict[Role, RowSlice] = {"target": part(draw, k, events), "guider": part(draw, k, events)}
    if with_base:
        slices["guider_base"] = RowSlice(np.zeros(0, np.int64), np.zeros(0), draw.normal(size=events), 0.25)
    required: dict[Role, RequiredLogits] = {role: needed(chosen) for role in ("target", "guider", "guider_base")}
    return RowProposal(required, slices)


def many(seed: int, count: int = 17) -> list[RowProposal]:
    draw = np.random.default_rng(seed)
    return [guided(draw, bool(draw.random() < 0.5)) for _ in range(count)]


def proposed(row: RowProposal) -> list[int]:
    events = {int(i) for required in row.required.values() for i in required.events}
    return sorted(events | {int(i) for part in row.slices.values() for i in part.ids if i >= 0})


def received(row: RowProposal, role: Role) -> dict[int, float]:
    """By brute force: a role's logits by id, from its slice, then from events."""
    found: dict[int, float] = {}
    if role in row.slices:
        mine = row.slices[role]
        found |= {int(i): float(z) for i, z in zip(mine.ids, mine.logits, strict=True) if i >= 0}
        found |= dict(zip(row.required[role].events.tolist(), mine.folded.tolist(), strict=True))
    return found


def table(block: CandidateBlock, at: int, role: Role) -> dict[int, float]:
    """A role's known logits of a row's candidates in a block, by id."""
    pairs = zip(block.ids[at].tolist(), block.values(role)[at].tolist(), strict=True)
    return {i: z for i, z in pairs if not np.isnan(z)}


def each(rows: list[RowProposal]) -> Mapping[int, tuple[CandidateBlock, int]]:
    """By row number its block and its index there."""
    return {number: (block, at) for block, numbers in group_into_blocks(rows) for at, number in enumerate(numbers)}


@pytest.mark.parametrize("seed", range(5))
def test_candidates_are_all_proposed_ids_in_order(seed: int) -> None:
    rows = many(seed)
    found = each(rows)
    assert sorted(found) == list(range(len(rows)))
    for number, (block, at) in found.items():
        assert block.ids[at, : block.counts[at]].tolist() == proposed(rows[number])
        assert (block.ids[at, block.counts[at] :] == PADDING).all()


@pytest.mark.parametrize("seed", range(5))
def test_values_are_the_received_logits_and_nan_elsewhere(seed: int) -> None:
    rows = many(seed)
    for number, (block, at) in each(rows).items():
        for role in rows[number].required:
            assert table(block, at, role) == received(rows[number], role)
            if role in rows[number].slices:
                of_role = list(rows[number].required).index(role)
                assert block.sums[of_role, at] == rows[number].slices[role].logsumexp


@pytest.mark.parametrize("seed", range(5))
def test_other_rows_change_neither_candidates_nor_values(seed: int) -> None:
    rows = many(seed, 23)
    for number, (block, at) in each(rows).items():
        alone = CandidateBlock([rows[number]])
        width = int(alone.counts[0])
        assert block.ids[at, :width].tolist() == alone.ids[0, :width].tolist()
        for role in rows[number].required:
            assert block.values(role)[at, :width].tobytes() == alone.values(role)[0, :width].tobytes()


@pytest.mark.parametrize("seed", range(5))
def test_no_logit_of_a_slice_or_event_is_looked_up(seed: int) -> None:
    rows = many(seed)
    found = each(rows)
    for block, numbers in group_into_blocks(rows):
        for role in rows[numbers[0]].required:
            at_rows, places, ids = block.missing_logits(role, EVERY_ID)
            assert (block.ids[at_rows, places] == ids).all()
            for at, number in enumerate(numbers):
                brings = set(received(rows[number], role)) | {int(i) for i in rows[number].required[role].events}
                assert ids[at_rows == at].tolist() == [i for i in proposed(rows[number]) if i not in brings]
    assert found


def test_ids_that_a_role_lacks_are_not_looked_up() -> None:
    (row,) = many(1, 1)
    theirs = np.where(EVERY_ID % 2 == 0, EVERY_ID + 1_000, -1)
    block = CandidateBlock([row])
    every, (_, _, ids) = block.missing_logits("guider_base", EVERY_ID)[2], block.missing_logits("guider_base", theirs)
    assert ids.tolist() == [i + 1_000 for i in every.tolist() if i % 2 == 0]


def test_a_late_answer_of_the_base_leaves_the_same_values() -> None:
    draw = np.random.default_rng(0)
    whole = guided(draw, with_base=True)
    base = whole.slices["guider_base"]
    late = RowProposal(whole.required, {role: part for role, part in whole.slices.items() if role != "guider_base"})
    block, at_once = CandidateBlock([late]), CandidateBlock([whole])
    assert not table(block, 0, "guider_base")
    block.add_slice("guider_base", 0, base)
    assert table(block, 0, "guider_base") == table(at_once, 0, "guider_base")
    assert (
        block.missing_logits("guider_base", EVERY_ID)[2].tolist()
        == at_once.missing_logits("guider_base", EVERY_ID)[2].tolist()
    )
    assert block.sums[2, 0] == base.logsumexp


def test_folded_events_stand_above_the_slice() -> None:
    required: dict[Role, RequiredLogits] = {"target": needed([7, 8])}
    row = RowProposal(required, {"target": RowSlice(np.array([3, 7]), np.array([1.0, 2.0]), np.array([2.5, 0.0]), 0.0)})
    assert table(CandidateBlock([row]), 0, "target") == {3: 1.0, 7: 2.5, 8: 0.0}


def test_nothing_outside_a_slice_is_above_its_lowest_logit() -> None:
    required: dict[Role, RequiredLogits] = {"target": needed([])}
    none = np.zeros(0)
    row = RowProposal(required, {"target": RowSlice(np.array([1, 2]), np.array([3.0, -1.0]), none, 0.0)})
    empty = RowProposal(required, {"target": RowSlice(np.zeros(0, np.int64), none, none, 0.0)})
    assert CandidateBlock([row]).ceiling.tolist() == [-1.0]
    assert CandidateBlock([empty]).ceiling.tolist() == [np.inf]
    assert CandidateBlock([empty]).ids.tolist() == [[PADDING]]


def test_equal_ids_have_one_place_even_at_the_largest() -> None:
    largest = np.iinfo(np.int32).max
    required: dict[Role, RequiredLogits] = {"target": needed([0]), "guider": needed([])}
    slices: dict[Role, RowSlice] = {
        "target": RowSlice(np.array([largest, 0, -1]), np.array([1.0, 2.0, 9.0]), np.array([2.5]), 0.0),
        "guider": RowSlice(np.array([5, largest]), np.array([3.0, 4.0]), np.zeros(0), 0.0),
    }
    block = CandidateBlock([RowProposal(required, slices)])
    assert table(block, 0, "target") == {0: 2.5, largest: 1.0}
    assert table(block, 0, "guider") == {5: 3.0, largest: 4.0}
    assert block.ids[0, :3].tolist() == [0, 5, largest]
