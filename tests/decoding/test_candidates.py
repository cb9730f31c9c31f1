"""Candidates, and what each role knows of them, against brute force over sets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from actors.decoding.candidates import NONE, PADDING, Ids, Lookup, Part, join, side_by_side

IDS = 200


def array(ids: Sequence[int]) -> Ids:
    return np.array(ids, np.int64)


def part(slice_: dict[int, float] | None = None, folded: dict[int, float] | None = None) -> Part:
    """A part whose row has come: its slice and its folded events as {id: logit}."""
    folded, slice_ = folded or {}, slice_ or {}
    out = Part(events=array([*folded]))
    out.arrive(
        np.array([*folded.values()], np.float64), array([*slice_]), np.array([*slice_.values()], np.float32), 0.5
    )
    return out


def table(role: Part, ids: Ids) -> dict[int, float]:
    """What a role knows of the row's candidates, as {id: logit}."""
    values = role.values(len(ids))
    return {int(i): float(z) for i, z in zip(ids, values, strict=True) if not np.isnan(z)}


def random_part(draw: np.random.Generator) -> Part:
    """A slice of up to 12 ids, some without a counterpart, and up to 3 events, some of them in the slice."""
    ids = draw.choice(IDS, int(draw.integers(0, 12)), replace=False)
    events = draw.choice(IDS, int(draw.integers(0, 4)), replace=False)
    if len(ids) and len(events) and draw.random() < 0.5 and ids[0] not in events:
        events[0] = ids[0]
    out = Part(events=events)
    slice_ = np.where(draw.random(len(ids)) < 0.2, -1, ids)
    out.arrive(draw.normal(size=len(events)), slice_, draw.normal(size=len(ids)).astype(np.float32), 0.0)
    return out


def random_rows(rows: int, seed: int) -> list[list[Part]]:
    """Rows of two or three roles: their shapes differ."""
    draw = np.random.default_rng(seed)
    return [[random_part(draw) for _ in range(int(draw.integers(2, 4)))] for _ in range(rows)]


def proposed(parts: Sequence[Part]) -> set[int]:
    return {int(i) for p in parts for ids in (p.events, p.ids) for i in ids if i >= 0}


def told(role: Part) -> dict[int, float]:
    """By brute force: what a role was told, the events last."""
    known: dict[int, float] = {}
    for lookup in role.lookups:
        assert lookup.values is not None
        known |= dict(zip(lookup.ids.tolist(), lookup.values.tolist(), strict=True))
    known |= {int(i): float(z) for i, z in zip(role.ids, role.logits, strict=True) if i >= 0}
    return known | dict(zip(role.events.tolist(), role.folded.tolist(), strict=True))


def look_up(role: Part, ids: Ids, draw: np.random.Generator) -> None:
    role.lookups.append(Lookup(ids, values=draw.normal(size=len(ids)).astype(np.float32)))


# -- the candidates of a row


@pytest.mark.parametrize("seed", range(5))
def test_candidates_are_what_anyone_put_forward_in_id_order(seed: int) -> None:
    rows = random_rows(17, seed)
    for ids, parts in zip(join(rows), rows, strict=True):
        assert ids.tolist() == sorted(proposed(parts))


@pytest.mark.parametrize("seed", range(5))
def test_a_rows_candidates_and_values_are_the_same_in_any_company(seed: int) -> None:
    rows = random_rows(23, seed)
    assert len({tuple(len(p.ids) for p in parts) for parts in rows}) > 1  # shapes differ
    together = join(rows)
    values = [[role.values(len(ids)) for role in parts] for ids, parts in zip(together, rows, strict=True)]
    for ids, parts, known in zip(together, rows, values, strict=True):
        (alone,) = join([parts])
        assert alone.tobytes() == ids.tobytes()
        assert [role.values(len(ids)).tobytes() for role in parts] == [z.tobytes() for z in known]


def test_rows_do_not_mix_even_at_the_largest_ids() -> None:
    largest = np.iinfo(np.int32).max
    rows = [[part({0: 0.0, largest: 1.0})], [part({0: 0.0, 1: 1.0})], [part({largest: 0.0})]]
    assert [ids.tolist() for ids in join(rows)] == [[0, largest], [0, 1], [largest]]
    assert join([]) == []


def test_what_is_looked_up_is_no_candidate_by_that() -> None:
    target, base = part({3: 1.0}), part()
    look_up(base, array([3]), np.random.default_rng(0))
    assert join([[target, base]])[0].tolist() == [3]


# -- what a role knows of them


@pytest.mark.parametrize("seed", range(5))
def test_values_are_what_was_told_and_nothing_where_it_was_not(seed: int) -> None:
    draw = np.random.default_rng(seed)
    rows = random_rows(11, seed)
    for parts in rows:
        for role, other in zip(parts, parts[1:] + parts[:1], strict=True):
            look_up(role, other.ids[other.ids >= 0], draw)
    for ids, parts in zip(join(rows), rows, strict=True):
        for role in parts:
            assert table(role, ids) == told(role)


def test_lookups_asked_before_the_candidates_are_known_find_their_places() -> None:
    target, guider = Part(), part({5: 0.5, 9: 0.75, -1: 0.0})
    target.lookups.append(Lookup(array([9, 5])))
    target.waiting = 1
    target.lookups[0].values = np.array([0.25, 0.125], np.float32)  # in the order asked
    target.waiting = 0
    target.arrive(np.zeros(0), array([7, 5]), np.array([2.0, 0.125], np.float32), 1.0)
    (ids,) = join([[target, guider]])
    assert table(target, ids) == {5: 0.125, 7: 2.0, 9: 0.25}
    assert table(guider, ids) == {5: 0.5, 9: 0.75}
    assert target.missing(len(ids)).tolist() == []


def test_a_lookup_of_what_is_no_candidate_any_more_changes_nothing() -> None:
    # The guider's slice was looked up in the target, then its replica was lost and another one likes other ids.
    target, guider = part({3: 1.0}), part({7: 0.5})
    look_up(target, array([7, 5, 900]), np.random.default_rng(0))
    (ids,) = join([[target, guider]])
    assert ids.tolist() == [3, 7]
    assert table(target, ids) == {3: 1.0, 7: told(target)[7]}
    assert target.missing(2).tolist() == []
    gone = part()
    look_up(gone, array([5]), np.random.default_rng(0))
    assert [len(ids) for ids in join([[gone]])] == [0]
    assert len(gone.values(0)) == 0


def test_folded_events_override_the_slice_and_lookups_of_the_same_id() -> None:
    role = part({3: 1.0, 7: 2.0}, folded={7: 2.5, 8: 0.0})
    look_up(role, array([7, 3]), np.random.default_rng(0))
    (ids,) = join([[role]])
    assert table(role, ids) == {3: 1.0, 7: 2.5, 8: 0.0}


def test_a_widened_slice_keeps_folded_events_and_what_lookups_brought() -> None:
    target, guider = part({3: 1.0}, folded={7: 2.5}), part({4: 0.5})
    look_up(target, array([4]), np.random.default_rng(0))
    brought = told(target)[4]
    join([[target, guider]])
    target.widen(array([3, 7, 8]), np.array([1.0, 2.0, 0.5], np.float32))
    (ids,) = join([[target, guider]])
    assert ids.tolist() == [3, 4, 7, 8]
    assert table(target, ids) == {3: 1.0, 4: brought, 7: 2.5, 8: 0.5}
    assert target.ceiling == 0.5
    assert target.missing(len(ids)).tolist() == []


@pytest.mark.parametrize("seed", range(5))
def test_what_is_missing_is_never_what_slice_events_or_lookups_bring(seed: int) -> None:
    draw = np.random.default_rng(seed)
    rows = random_rows(13, seed)
    for parts in rows:
        others = parts[1].ids[parts[1].ids >= 0]
        look_up(parts[0], others[: len(others) // 2], draw)
    for ids, parts in zip(join(rows), rows, strict=True):
        for role in parts:
            assert ids[role.missing(len(ids))].tolist() == [i for i in ids.tolist() if i not in told(role)]


def test_what_was_asked_for_and_has_not_come_is_not_asked_again() -> None:
    target, base = part({3: 1.0, 4: 2.0}), part()
    (ids,) = join([[target, base]])
    places = base.missing(2)
    base.lookups.append(Lookup(ids[places], places))
    assert places.tolist() == [0, 1]
    assert base.missing(2).tolist() == []


def test_a_part_is_complete_when_all_that_was_asked_has_come() -> None:
    row = part({1: 0.0})
    before = row.complete
    row.waiting += 1
    assert (before, row.complete, Part().complete) == (True, False, False)


def test_nothing_outside_a_slice_is_above_its_lowest_logit() -> None:
    assert part({1: 3.0, 2: -1.0}).ceiling == -1.0
    assert part().ceiling == np.inf


# -- rows side by side


@pytest.mark.parametrize("seed", range(3))
def test_rows_side_by_side_are_the_rows_and_padding_behind(seed: int) -> None:
    rows = random_rows(9, seed)
    candidates = join(rows)
    dense = side_by_side(candidates)
    firsts = [parts[0] for parts in rows]
    values = dense.values(firsts, [len(ids) for ids in candidates])
    for row, (ids, role) in enumerate(zip(candidates, firsts, strict=True)):
        assert dense.ids[row, : len(ids)].tolist() == ids.tolist()
        assert (dense.ids[row, len(ids) :] == PADDING).all()
        assert dense.inside[row].tolist() == [place < len(ids) for place in range(dense.ids.shape[1])]
        np.testing.assert_array_equal(values[row, : len(ids)], role.values(len(ids)))
        assert np.isnan(values[row, len(ids) :]).all()


def test_a_row_without_candidates_is_padding_alone() -> None:
    dense = side_by_side([NONE])
    assert (dense.ids.tolist(), dense.inside.tolist()) == ([[PADDING]], [[False]])
