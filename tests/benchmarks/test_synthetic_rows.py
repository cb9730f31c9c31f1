from __future__ import annotations

import numpy as np

from actors.engine.interface import Extend, Held, KVMiss
from benchmarks.synthetic_rows import Tail, TailEngine, TailStream


def stream(tail: Tail, cycle: int | None = None) -> TailStream:
    return TailStream(tail, 20_000, seed=3, cycle=cycle)


def test_rows_fall_with_their_exponent() -> None:
    rows = stream(Tail(1.5)).at(0)
    for role in ("target", "guider"):
        ranked = np.sort(rows[role].logits)[::-1].astype(np.float64)
        np.testing.assert_allclose(ranked, -1.5 * np.log(np.arange(1, 20_001)), atol=1e-5)


def test_half_of_the_two_heads_is_shared() -> None:
    rows = stream(Tail(2.2))
    shared = []
    for position in range(10):
        row = rows.at(position)
        shared.append(np.intersect1d(row["target"].head(128)[0], row["guider"].head(128)[0]).size)
    assert 0.4 < np.mean(shared) / 128 < 0.6


def test_a_head_is_the_likeliest_ids_in_id_order_with_ties_to_the_lowest() -> None:
    row = stream(Tail(2.2)).at(1)["guider_base"]
    row.logits[:] = np.round(row.logits)
    expected = np.lexsort((np.arange(20_000), -row.logits))
    for k in (0, 5, 128, 20_000):
        assert row.head(k)[0].tolist() == sorted(expected[:k].tolist())


def test_a_far_base_falls_below_the_guider_outside_the_head_alone() -> None:
    near, far = (stream(Tail(2.2, far=gap)).at(0) for gap in (0.0, 3.0))
    gap = near["guider_base"].logits - far["guider_base"].logits
    head = near["guider"].head(128)[0]
    assert np.abs(gap[head]).max() < 1e-4
    assert np.median(np.delete(gap, head)) > 2.9


def test_rows_are_the_same_in_any_order_and_come_again_after_a_cycle() -> None:
    one, other = stream(Tail(1.2)), stream(Tail(1.2), cycle=2)
    late = one.at(7)["target"].logits
    for position in range(6):
        one.at(position)
    assert (one.at(7)["target"].logits == late).all()
    assert other.at(5) is other.at(1)


def test_an_engine_answers_from_its_session_alone() -> None:
    engine = TailEngine(stream(Tail(2.0)), "guider")
    assert engine.extend([Extend(1, 0, engine.hash_seed, [4, 5], 1, 0)]) == [Held(1, 2, 1)]
    assert engine.extend([Extend(1, 3, 0, [6], 1, 0), Extend(2, 1, 0, [6], 1, 0)]) == [KVMiss(1, 2), KVMiss(2, 0)]
    held = engine.rows(1)
    assert held is not None
    slices = held.slices(8)
    assert (engine.values([(held, 0)], [8], slices.ids[0]) == slices.logits[0]).all()
    assert (held.whole()[0][slices.ids[0]] == slices.logits[0]).all()
    engine.close(1)
    assert engine.rows(1) is None
