from __future__ import annotations

import random

import pytest
import torch

from actors.engine.kv_pool import KVPool


def fill(pool: KVPool, session: int, start: int, values: list[float]) -> None:
    """Write `values` as the keys (and their negatives as the values) of a session from position `start`."""
    assert pool.reserve(session, 0, start + len(values))
    first = pool.start(session) + start
    keys = torch.tensor(values)[:, None, None]
    pool.write(0, torch.arange(first, first + len(values)), keys, -keys)
    pool.commit(session, start + len(values))


def read(pool: KVPool, session: int) -> list[float]:
    keys, values = pool.layers[0]
    rows = slice(pool.start(session), pool.start(session) + pool.length(session))
    assert torch.equal(keys[rows], -values[rows])
    return [float(number) for number in keys[rows].flatten()]


def test_a_growing_session_keeps_its_content_when_it_moves() -> None:
    pool = KVPool(256, unit=8)
    fill(pool, 1, 0, [1.0] * 8)
    fill(pool, 2, 0, [2.0] * 8)
    before = pool.start(1)
    fill(pool, 1, 8, [3.0] * 4)
    assert pool.start(1) != before
    assert read(pool, 1) == [1.0] * 8 + [3.0] * 4
    pool.check()


def test_fragmented_room_is_compacted_on_demand() -> None:
    pool = KVPool(64, unit=8)
    for session in range(8):
        fill(pool, session, 0, [float(session)] * 8)
    for session in (0, 2, 4, 6):
        pool.drop(session)
    fill(pool, 9, 0, [9.0] * 30)
    assert read(pool, 9) == [9.0] * 30
    assert all(read(pool, session) == [float(session)] * 8 for session in (1, 3, 5, 7))
    pool.check()


def test_a_session_grows_through_fragments_into_all_free_rows() -> None:
    pool = KVPool(64, unit=8)
    for session in range(8):
        fill(pool, session, 0, [float(session)] * 8)
    for session in (1, 3, 5):
        pool.drop(session)
    fill(pool, 0, 8, [0.5] * 24)
    assert read(pool, 0) == [0.0] * 8 + [0.5] * 24
    assert not pool.reserve(2, 0, 9)
    pool.check()


def test_slack_is_given_up_before_room_is_refused() -> None:
    pool = KVPool(64, unit=8)
    fill(pool, 1, 0, [1.0] * 8)
    fill(pool, 2, 0, [2.0] * 8)
    fill(pool, 1, 8, [1.0] * 20)  # moved, with more capacity than it needs
    pool.commit(1, 8)
    assert pool.used == 16
    fill(pool, 3, 0, [3.0] * 48)
    assert read(pool, 1) == [1.0] * 8
    pool.check()


def test_a_fork_is_a_copy() -> None:
    pool = KVPool(64, unit=8)
    fill(pool, 1, 0, [1.0, 2.0, 3.0])
    assert pool.fork(1, 2, 2)
    fill(pool, 1, 1, [9.0])
    assert read(pool, 2) == [1.0, 2.0]
    assert not pool.fork(2, 3, 2) or pool.length(3) == 2
    pool.check()


def test_content_survives_any_history() -> None:
    draw, pool, mirror = random.Random(1), KVPool(512, unit=8), dict[int, list[float]]()
    pool.write(0, torch.tensor([pool.trash]), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
    for step in range(1500):
        session = draw.randrange(12)
        if draw.random() < 0.15:
            pool.drop(session)
            mirror.pop(session, None)
            continue
        start = draw.randint(0, len(mirror.get(session, [])))
        new = [float(step)] * draw.randint(1, 40)
        if pool.reserve(session, 0, start + len(new)):
            fill(pool, session, start, new)
            mirror[session] = mirror.get(session, [])[:start] + new
        pool.check()
        assert all(read(pool, key) == values for key, values in mirror.items())


def test_a_wrong_length_is_noticed() -> None:
    pool = KVPool(64, unit=8)
    fill(pool, 1, 0, [1.0])
    pool.caches[1].length = 2
    with pytest.raises(AssertionError):
        pool.check()
