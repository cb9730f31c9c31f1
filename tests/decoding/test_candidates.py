"""Candidates and each role's logits at them, compared with sets by brute force."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from actors.api.generation import ROLES, Role
from actors.decoding.candidates import PADDING, BlockLayout, CandidateBlock, RowSlice
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


@dataclass
class Rows:
    """Rows of one shape: the required logits of each role, and by row the slices received so far."""

    required: dict[Role, RequiredLogits]
    slices: list[dict[Role, RowSlice]]

    def block(self, *numbers: int) -> CandidateBlock:
        """A block of some of the rows, or of all, after the merge."""
        chosen = [self.slices[number] for number in numbers or range(len(self.slices))]
        widths = {role: max(len(each[role].ids) if role in each else 0 for each in chosen) for role in self.required}
        block = CandidateBlock(len(chosen), BlockLayout(self.required, widths))
        for at, each in enumerate(chosen):
            for role, one in each.items():
                store(block, role, at, one)
        block.merge(np.arange(len(chosen)))
        return block


def store(block: CandidateBlock, role: Role, at: int, one: RowSlice) -> None:
    columns = one.ids[None], one.logits[None], one.folded[None], np.array([one.logsumexp]), np.array([one.tempered])
    block.store(role, np.array([at]), *columns)


def many(seed: int, count: int = 17) -> Rows:
    """Rows with the answers of target and guider, and of the base in half of them."""
    draw = np.random.default_rng(seed)
    k, events = int(draw.integers(1, 12)), int(draw.integers(1, 3))
    chosen = draw.choice(IDS, events, replace=False).tolist()
    rows = []
    for _ in range(count):
        slices: dict[Role, RowSlice] = {"target": part(draw, k, events), "guider": part(draw, k, events)}
        if draw.random() < 0.5:
            slices["guider_base"] = RowSlice(np.zeros(0, np.int64), np.zeros(0), draw.normal(size=events), 0.25)
        rows.append(slices)
    return Rows({role: needed(chosen) for role in ROLES}, rows)


def proposed(rows: Rows, number: int) -> list[int]:
    events = {int(i) for required in rows.required.values() for i in required.events}
    return sorted(events | {int(i) for part in rows.slices[number].values() for i in part.ids if i >= 0})


def received(rows: Rows, number: int, role: Role) -> dict[int, float]:
    """By brute force: a role's logits by id, from its slice, then from events."""
    found: dict[int, float] = {}
    if role in rows.slices[number]:
        mine = rows.slices[number][role]
        found |= {int(i): float(z) for i, z in zip(mine.ids, mine.logits, strict=True) if i >= 0}
        found |= dict(zip(rows.required[role].events.tolist(), mine.folded.tolist(), strict=True))
    return found


def table(block: CandidateBlock, at: int, role: Role) -> dict[int, float]:
    """A role's known logits of a row's candidates in a block, by id."""
    count, number = int(block.counts[at]), block.roles[role]
    pairs = zip(block.ids[at, :count].tolist(), block.logits[number, at, :count].tolist(), strict=True)
    return {i: z for i, z in pairs if not np.isnan(z)}


@pytest.mark.parametrize("seed", range(5))
def test_candidates_are_all_proposed_ids_in_order(seed: int) -> None:
    rows = many(seed)
    block = rows.block()
    for at in range(len(block)):
        count = int(block.counts[at])
        assert block.ids[at, :count].tolist() == proposed(rows, at)
        assert (block.ids[at, count:] == PADDING).all()


@pytest.mark.parametrize("seed", range(5))
def test_values_are_the_received_logits_and_nan_elsewhere(seed: int) -> None:
    rows = many(seed)
    block = rows.block()
    for at, slices in enumerate(rows.slices):
        for number, role in enumerate(rows.required):
            assert table(block, at, role) == received(rows, at, role)
            if role in slices:
                assert block.sums[number, at] == slices[role].logsumexp


@pytest.mark.parametrize("seed", range(5))
def test_other_rows_change_neither_candidates_nor_values(seed: int) -> None:
    rows = many(seed, 23)
    together = rows.block()
    for at in range(len(together)):
        alone, count = rows.block(at), int(together.counts[at])
        assert together.ids[at, :count].tolist() == alone.ids[0, :count].tolist()
        assert together.logits[:, at, :count].tobytes() == alone.logits[:, 0, :count].tobytes()


@pytest.mark.parametrize("seed", range(5))
def test_no_logit_of_a_slice_or_event_is_looked_up(seed: int) -> None:
    rows = many(seed)
    block, some = rows.block(), np.array([11, 3, 8])
    for role in rows.required:
        asked, counts, places, ids = block.missing_logits(role, some, EVERY_ID)
        at_rows = np.repeat(asked, counts)
        assert (block.ids[at_rows, places] == ids).all()
        assert list(dict.fromkeys(at_rows.tolist())) == [at for at in some.tolist() if at in at_rows]
        for at in some.tolist():
            brings = set(received(rows, at, role)) | {int(i) for i in rows.required[role].events}
            assert ids[at_rows == at].tolist() == [i for i in proposed(rows, at) if i not in brings]


def test_ids_that_a_role_lacks_are_not_looked_up() -> None:
    block, first = many(1, 1).block(), np.array([0])
    theirs = np.where(EVERY_ID % 2 == 0, EVERY_ID + 1_000, -1)
    every = block.missing_logits("guider_base", first, EVERY_ID).ids
    assert block.missing_logits("guider_base", first, theirs).ids.tolist() == [
        i + 1_000 for i in every.tolist() if i % 2 == 0
    ]


def test_ids_looked_up_are_ascending_where_a_role_numbers_them_otherwise() -> None:
    block, first = many(2, 1).block(), np.array([0])
    _, _, places, ids = block.missing_logits("guider_base", first, IDS - EVERY_ID)
    assert (np.diff(ids) > 0).all()
    assert (IDS - block.ids[0, places] == ids).all()


def test_a_late_answer_of_the_base_leaves_the_same_values() -> None:
    rows = many(0, 40)
    at = next(number for number, slices in enumerate(rows.slices) if "guider_base" in slices)
    late = Rows(rows.required, [{role: one for role, one in rows.slices[at].items() if role != "guider_base"}])
    block, at_once, first = late.block(), rows.block(at), np.array([0])
    assert not table(block, 0, "guider_base")
    store(block, "guider_base", 0, rows.slices[at]["guider_base"])
    block.add_events("guider_base", first)
    assert table(block, 0, "guider_base") == table(at_once, 0, "guider_base")
    missing = [each.missing_logits("guider_base", first, EVERY_ID)[2].tolist() for each in (block, at_once)]
    assert missing[0] == missing[1]
    assert block.sums[2, 0] == 0.25


def test_folded_events_stand_above_the_slice() -> None:
    required: dict[Role, RequiredLogits] = {"target": needed([7, 8])}
    one = RowSlice(np.array([3, 7]), np.array([1.0, 2.0]), np.array([2.5, 0.0]), 0.0)
    assert table(Rows(required, [{"target": one}]).block(), 0, "target") == {3: 1.0, 7: 2.5, 8: 0.0}


def test_nothing_outside_a_slice_is_above_its_lowest_logit() -> None:
    required: dict[Role, RequiredLogits] = {"target": needed([])}
    none = np.zeros(0)
    one = RowSlice(np.array([1, 2]), np.array([3.0, -1.0]), none, 0.0)
    empty = Rows(required, [{"target": RowSlice(np.zeros(0, np.int64), none, none, 0.0)}]).block()
    assert Rows(required, [{"target": one}]).block().ceiling.tolist() == [-1.0]
    assert empty.ceiling.tolist() == [np.inf]
    assert empty.ids.tolist() == [[PADDING]]


def test_a_slice_is_read_back_as_it_was_stored() -> None:
    rows = many(3, 4)
    block = rows.block()
    for role, one in rows.slices[2].items():
        back = block.slice(role, 2)
        assert back.ids.tolist() == one.ids.tolist()
        assert back.logits.tolist() == one.logits.tolist()
        assert back.folded.tolist() == one.folded.tolist()
        assert back.logsumexp == one.logsumexp


def test_equal_ids_have_one_place_even_at_the_largest() -> None:
    largest = np.iinfo(np.int32).max
    required: dict[Role, RequiredLogits] = {"target": needed([0]), "guider": needed([])}
    slices: dict[Role, RowSlice] = {
        "target": RowSlice(np.array([largest, 0, -1]), np.array([1.0, 2.0, 9.0]), np.array([2.5]), 0.0),
        "guider": RowSlice(np.array([5, largest]), np.array([3.0, 4.0]), np.zeros(0), 0.0),
    }
    block = Rows(required, [slices]).block()
    assert table(block, 0, "target") == {0: 2.5, largest: 1.0}
    assert table(block, 0, "guider") == {5: 3.0, largest: 4.0}
    assert block.ids[0, :3].tolist() == [0, 5, largest]
