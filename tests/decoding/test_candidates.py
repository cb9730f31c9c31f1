"""Candidates and lookups against brute force over sets."""

from __future__ import annotations

import numpy as np
import pytest

from actors.decoding.candidates import SPAN, Ids, Part, candidates, keys, missing, unique


def part(*pieces: tuple[list[int], list[float]]) -> Part:
    """A part whose first piece is the slice, with no folded events."""
    out = Part()
    (ids, logits), *looked_up = pieces
    out.add_rows(np.zeros(0, np.int64), np.zeros(0), np.array(ids, np.int64), np.array(logits, np.float32), 0.0)
    for ids, logits in looked_up:
        out.add_values(np.array(ids, np.int64), np.array(logits, np.float32))
    return out


def random_parts(rows: int, seed: int) -> list[tuple[Part, Part]]:
    draw = np.random.default_rng(seed)
    out = []
    for _ in range(rows):
        pair = []
        for _ in range(2):
            ids = draw.choice(200, int(draw.integers(0, 12)), replace=False)
            ids = np.where(draw.random(len(ids)) < 0.2, -1, ids)
            pair.append(part((ids.tolist(), draw.normal(size=len(ids)).tolist())))
        out.append((pair[0], pair[1]))
    return out


def proposed(*parts: Part) -> set[int]:
    return {int(i) for p in parts for piece in p.proposed for i in piece if i >= 0}


@pytest.mark.parametrize("seed", range(5))
def test_candidates_are_what_anyone_proposed_in_id_order(seed: int) -> None:
    parts = random_parts(17, seed)
    dense = candidates(parts)
    for row, pair in enumerate(parts):
        real = dense.ids[row][dense.inside[row]]
        assert real.tolist() == sorted(proposed(*pair))
        assert (dense.ids[row][~dense.inside[row]] == SPAN).all()
        assert (np.diff(dense.inside[row].astype(int)) <= 0).all()  # padding behind


@pytest.mark.parametrize("seed", range(5))
def test_a_rows_candidates_are_the_same_in_any_company(seed: int) -> None:
    parts = random_parts(9, seed)
    together = candidates(parts)
    for row, pair in enumerate(parts):
        alone = candidates([pair])
        assert alone.ids[0][alone.inside[0]].tolist() == together.ids[row][together.inside[row]].tolist()


@pytest.mark.parametrize("seed", range(5))
def test_values_are_what_is_known_and_nothing_where_it_is_not(seed: int) -> None:
    parts = random_parts(11, seed)
    dense = candidates(parts)
    for role in (0, 1):
        values = dense.values([pair[role] for pair in parts])
        for row, pair in enumerate(parts):
            table: dict[int, float] = {}
            for ids, logits in zip(pair[role].ids, pair[role].values, strict=True):
                table |= {int(i): float(z) for i, z in zip(ids, logits, strict=True) if i >= 0}
            for column, token in enumerate(dense.ids[row].tolist()):
                expected = table.get(token, np.nan)
                assert values[row, column] == expected or (np.isnan(values[row, column]) and np.isnan(expected))


@pytest.mark.parametrize("seed", range(5))
def test_what_is_missing_is_what_was_wanted_and_not_asked(seed: int) -> None:
    draw = np.random.default_rng(seed)
    wanted = [set(draw.choice(60, 15).tolist()) for _ in range(8)]
    asked = [set(draw.choice(60, 10).tolist()) | {-1} for _ in range(8)]
    gaps = missing(
        unique(keys([[np.array(sorted(ids))] for ids in wanted])), [[np.array(sorted(ids))] for ids in asked]
    )
    assert [gap.tolist() for gap in gaps] == [sorted(w - a) for w, a in zip(wanted, asked, strict=True)]


def test_rows_do_not_mix_even_at_the_largest_ids() -> None:
    largest = np.iinfo(np.int32).max
    rows: list[list[Ids]] = [[np.array([0, largest])], [np.array([0])], [np.array([largest])]]
    assert len(unique(keys(rows))) == 4
    assert keys([]).tolist() == []


def test_folded_events_stand_before_the_slice() -> None:
    folded = Part()
    folded.add_rows(np.array([7]), np.array([2.5]), np.array([3, 7]), np.array([1.0, 2.0], np.float32), 0.0)
    dense = candidates([[folded]])
    assert dict(zip(dense.ids[0].tolist(), dense.values([folded])[0].tolist(), strict=True)) == {3: 1.0, 7: 2.5}


def test_folded_events_survive_a_widening() -> None:
    folded = Part()
    folded.add_rows(np.array([7]), np.array([2.5]), np.array([3]), np.array([1.0], np.float32), 0.0)
    folded.widen(np.array([3, 7, 8]), np.array([1.0, 2.0, 0.5], np.float32))
    dense = candidates([[folded]])
    assert dict(zip(dense.ids[0].tolist(), dense.values([folded])[0].tolist(), strict=True)) == {3: 1, 7: 2.5, 8: 0.5}


def test_lookups_that_came_before_the_row_are_kept() -> None:
    early = Part()
    early.asked.append(np.array([4, 5]))
    early.waiting = 1
    early.add_values(np.array([4, 5]), np.array([0.25, 0.5], np.float32))
    early.waiting = 0
    before = early.complete
    early.add_rows(np.zeros(0, np.int64), np.zeros(0), np.array([5, 6]), np.array([0.5, 0.75], np.float32), 1.0)
    assert (before, early.complete) == (False, True)
    other = part(([4], [0.0]))
    dense = candidates([[early, other]])
    assert dense.values([early])[0].tolist() == [0.25, 0.5, 0.75]
    assert missing(unique(keys([[np.array([4, 5, 6])]])), [early.asked])[0].tolist() == []


def test_a_part_is_complete_when_all_that_was_asked_has_come() -> None:
    row = part(([1], [0.0]))
    before = row.complete
    row.waiting += 1
    assert (before, row.complete, Part().complete) == (True, False, False)


def test_a_role_of_which_no_row_is_known_gives_nothing() -> None:
    known, unknown = part(([1, 2], [0.5, 0.25])), part(([], []))
    dense = candidates([[known, unknown]])
    assert np.isnan(dense.values([unknown])).all()
