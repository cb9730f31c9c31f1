from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from actors.engine.memory import MAX_ROWS, MIN_ROWS
from actors.engine.rows import (
    DeviceRows,
    LogitsRowStore,
    RowBlock,
    RowLocation,
    pack_slices,
    reduce_rows,
    row_budget,
    top_k,
    top_k_on_device,
    unpack_slices,
    values_at,
)


def held(logits: torch.Tensor, position: int = 0) -> DeviceRows:
    return rows_of(RowBlock(logits), range(len(logits)), position)


def rows_of(block: RowBlock, rows: Sequence[int], position: int = 0) -> DeviceRows:
    places = tuple(RowLocation(block, row) for row in rows)
    return DeviceRows(position, tuple(range(100, 100 + len(rows))), places, batch_invariant=True, fresh=len(rows))


def test_the_row_budget_is_a_share_of_the_memory_within_bounds() -> None:
    budgets = [row_budget(width, torch.device("cpu")) for width in (2_000, 150_000, 10**9)]
    assert budgets == sorted(budgets, reverse=True)
    assert (budgets[0], budgets[-1]) == (MAX_ROWS, MIN_ROWS)


def reference_top_k(row: torch.Tensor, k: int) -> list[int]:
    return sorted(sorted(range(len(row)), key=lambda index: (-float(row[index]), index))[:k])


@pytest.mark.parametrize("way", [top_k, top_k_on_device])
@pytest.mark.parametrize("k", [1, 5, 128, 509])
def test_of_equal_logits_the_lowest_ids_are_taken_in_id_order(way: Any, k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-9, 9, (24, 509), generator=generator) / 4
    logits[3] = 0.0
    logits[4, ::2] = -0.0  # equals 0.0
    logits[5] = torch.randn(509, generator=generator)
    logits[6, 7:] = float("-inf")
    values, ids = way(logits, k)
    for row in range(len(logits)):
        assert ids[row].tolist() == reference_top_k(logits[row], k)
        assert torch.equal(values[row], logits[row][ids[row]])


def test_slices_are_in_id_order_and_carry_the_logsumexp_of_the_whole_row() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    slices = held(logits).slices(7)
    assert slices.ids.dtype == np.int32
    assert slices.logits.dtype == slices.logsumexp.dtype == np.float32
    assert slices.ids.shape == slices.logits.shape == (3, 7)
    np.testing.assert_allclose(slices.logsumexp, np.log(np.exp(logits.numpy()).sum(-1)), rtol=1e-5)
    assert np.all(np.diff(slices.ids, axis=1) > 0)


@pytest.mark.parametrize(("rows", "k"), [(3, 7), (0, 7), (2, 0)])
def test_slices_are_copied_to_the_host_at_once(rows: int, k: int) -> None:
    logits = torch.randn(rows, 50, generator=torch.Generator().manual_seed(1))
    values, ids = top_k_on_device(logits, k)
    packed = pack_slices(ids, values, logits.logsumexp(-1), (logits / 0.6).logsumexp(-1))
    assert packed.shape == (rows * (2 * k + 2),)
    one, other = (
        unpack_slices(packed.numpy(), rows, k),
        reduce_rows(logits, k, batch_invariant=False, temperatures=[0.6] * rows),
    )
    assert np.array_equal(one.ids, other.ids)
    assert np.array_equal(one.logits, other.logits)
    assert np.array_equal(one.logsumexp, other.logsumexp)
    assert np.allclose(one.tempered, other.tempered, rtol=1e-6)


def test_k_zero_gives_only_the_logsumexp_and_a_large_k_the_whole_row() -> None:
    rows = held(torch.randn(2, 10, generator=torch.Generator().manual_seed(1)))
    assert rows.slices(0).ids.shape == (2, 0)
    assert rows.slices(0).logsumexp.shape == (2,)
    assert rows.slices(99).ids.shape == (2, 10)


def test_an_invariant_reduction_has_the_same_bits_in_any_batch() -> None:
    logits = torch.randn(9, 509, generator=torch.Generator().manual_seed(2))
    heats = [1.0, 0.6, 0.7] * 3
    together = reduce_rows(logits, 16, True, heats)
    exact = torch.stack([(row.double() / heat).logsumexp(-1) for row, heat in zip(logits, heats, strict=True)])
    np.testing.assert_allclose(together.tempered, exact.numpy(), rtol=1e-6)
    for row in range(9):
        single = reduce_rows(logits[row : row + 1], 16, True, heats[row : row + 1])
        assert single.tempered[0].tobytes() == together.tempered[row].tobytes()
        assert single.logsumexp[0].tobytes() == together.logsumexp[row].tobytes()
        assert np.array_equal(single.ids[0], together.ids[row])


def test_lookups_are_exact_and_refuse_ids_outside_the_row() -> None:
    one, other = (torch.randn(3, 20, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4))
    first, second = RowBlock(one), RowBlock(other)
    places = [RowLocation(first, 2), RowLocation(second, 0), RowLocation(first, 0)]
    values = values_at(places, [2, 0, 1], np.array([19, 0, 3]))
    assert values.tolist() == [float(one[2, 19]), float(one[2, 0]), float(one[0, 3])]
    mixed = values_at(places, [1, 2, 1], np.array([4, 5, 6, 7]))
    assert mixed.tolist() == [float(v) for v in (one[2, 4], other[0, 5], other[0, 6], one[0, 7])]
    assert values_at(places, [0, 0, 0], np.zeros(0, np.int32)).shape == (0,)
    for outside in (20, -1):
        with pytest.raises(IndexError, match=r"\[0, 20\)"):
            values_at(places, [1, 0, 0], np.array([outside]))


def test_whole_rows_cannot_be_written() -> None:
    whole = held(torch.zeros(1, 4)).whole()
    with pytest.raises(ValueError, match="read-only"):
        whole[0, 0] = 1.0


def test_a_row_is_found_by_position_and_hash_together() -> None:
    rows = held(torch.zeros(3, 4), position=10)
    assert rows.index(11, 101) == 1
    assert rows.index(11, 100) is None  # another token at that position
    assert rows.index(9, 100) is None
    assert rows.index(13, 103) is None


def test_the_oldest_forwards_rows_go_when_the_budget_is_full() -> None:
    store = LogitsRowStore(budget=8)
    block = RowBlock(torch.zeros(4, 4))
    store.hold(1, rows_of(block, [0, 1]), 0)
    store.hold(2, rows_of(block, [2]), 0)
    store.hold(3, held(torch.zeros(2, 4)), 0)
    store.make_room(2)
    assert store.get(1) is not None
    store.hold(4, held(torch.zeros(2, 4)), 0)
    store.make_room(4)
    assert store.get(1) is None
    assert store.get(2) is None
    assert store.get(3) is not None
    store.check()


def test_a_forwards_memory_counts_until_its_last_session_drops_it() -> None:
    store = LogitsRowStore(budget=8)
    block = RowBlock(torch.zeros(8, 4))
    store.hold(1, rows_of(block, [0]), 0)
    store.hold(2, rows_of(block, [1]), 0)
    store.drop(1)
    assert store.size == 8
    store.drop(2)
    assert store.size == 0
    store.check()


def test_only_kept_rows_stay_with_newer_ones() -> None:
    store = LogitsRowStore(budget=16)
    store.hold(1, held(torch.zeros(3, 4), position=10), 10)
    store.hold(1, held(torch.ones(1, 4), position=13), 13, keep=2)
    rows = store.get(1)
    assert rows is not None
    assert (rows.position, rows.size, rows.fresh) == (11, 3, 1)
    store.hold(1, held(torch.ones(1, 4), position=12), 12, keep=5)  # 12 is taken back
    rows = store.get(1)
    assert rows is not None
    assert (rows.position, rows.size) == (11, 2)
    store.hold(1, held(torch.ones(1, 4), position=13), 13, keep=1)
    assert store.size == 2, "the first forward, and the one of position 13 that was taken back, are let go"
    store.hold(1, held(torch.ones(1, 4), position=20), 20, keep=1)
    rows = store.get(1)
    assert rows is not None
    assert (rows.position, rows.size, store.size) == (20, 1, 1)
    store.hold(1, held(torch.ones(1, 4), position=21), 20, keep=1)  # a row of the last of two tokens
    rows = store.get(1)
    assert rows is not None
    assert (rows.position, rows.size) == (21, 1)
    store.check()
