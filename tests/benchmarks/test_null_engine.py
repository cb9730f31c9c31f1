import numpy as np
import pytest

from actors.decoding.hashing import extend_hashes
from actors.engine.errors import BadExtend
from actors.engine.interface import Extend, Full, Held, KVMiss
from actors.replica.engine_thread import Engine
from benchmarks.null_engine import NullEngine, tail_bank


def extend(engine: NullEngine, session: int, tokens: list[int], before: list[int], rows: int = 1) -> Extend:
    prefix = extend_hashes(engine.hash_seed, before)[-1] if before else engine.hash_seed
    return Extend(session, len(before), prefix, tokens, rows, 0)


def test_the_same_tokens_have_the_same_row_however_extended() -> None:
    engine: Engine = (null := NullEngine(50))
    engine.extend([extend(null, 1, [1, 2, 3], []), extend(null, 2, [1], [])])
    engine.extend([extend(null, 2, [2, 3], [1])])
    whole = engine.whole([1, 2])
    assert whole[0].tolist() == whole[1].tolist()


def test_slices_lookups_and_whole_rows_agree() -> None:
    engine = NullEngine(50)
    engine.extend([extend(engine, 1, [1, 2], [], rows=2)])
    held, slices, whole = engine.rows(1), engine.reduce([1], 5), engine.whole([1])
    assert held is not None
    for row in (0, 1):
        ids = np.sort(np.lexsort((np.arange(50), -whole[row]))[:5])
        assert slices.ids[row].tolist() == ids.tolist()
        assert (
            slices.logits[row].tolist() == engine.values([(held, row)], [5], ids).tolist() == whole[row][ids].tolist()
        )
        assert slices.logsumexp[row] == pytest.approx(np.log(np.exp(whole[row].astype(np.float64)).sum()))


def test_a_cache_misses_rewinds_fills_and_closes_like_an_engines() -> None:
    engine = NullEngine(50, cache_tokens=5)
    assert engine.extend([extend(engine, 1, [1, 2, 3], [])]) == [Held(1, 3, 1)]
    assert engine.extend([extend(engine, 1, [9], [1, 2, 3, 4]), extend(engine, 2, [1] * 3, [])]) == [
        KVMiss(1, 3),
        Full(2),
    ]
    assert engine.extend([extend(engine, 1, [9], [7])]) == [KVMiss(1, 0)]
    assert engine.extend([extend(engine, 1, [9], [1])]) == [Held(1, 2, 1)]
    assert engine.cache_stats().tokens_used == 2
    engine.close(1)
    assert (engine.cache_stats().tokens_used, engine.rows(1)) == (0, None)
    with pytest.raises(BadExtend):
        engine.check_extend(extend(engine, 1, [50], []))


def test_the_heads_of_two_roles_overlap_and_differ() -> None:
    target, guider = tail_bank(5_000, "target"), tail_bank(5_000, "guider")
    shared = len(set(target.order[0, :128]) & set(guider.order[0, :128]))
    assert 32 < shared < 128
