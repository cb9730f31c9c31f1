from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

from actors.decoding.cross_vocab.translators import RetokenizingTranslator
from actors.decoding.hashing import extend_hashes
from actors.decoding.stream import Stream
from actors.engine.errors import BadExtend, RowGone, StepFailed
from actors.engine.interface import Extend, Full, Held, KVMiss
from actors.engine.native_runner import native_engine
from tests.support.deadlines import HANG_S
from tests.support.tiny_models import ARCHITECTURES, VOCABULARY, Driver, qwen2, tokens
from tests.support.trained_models import alignment


def driver(cache_tokens: int = 1024, **options: Any) -> Driver:
    return Driver(native_engine(qwen2(), cache_tokens, **options))


@pytest.mark.parametrize("backend", ["per_session", "gathered"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ragged_sessions_equal_plain_forwards(architecture: str, backend: str) -> None:
    engine = native_engine(ARCHITECTURES[architecture](), 1024, backend=backend)
    run = Driver(engine)
    texts = {session: tokens(length, session) for session, length in enumerate([1, 7, 20, 33])}
    engine.extend([run.make(session, text[: len(text) // 2 + 1]) for session, text in texts.items()])
    rest = [run.make(session, text[len(text) // 2 + 1 :]) for session, text in texts.items() if len(text) > 1]
    engine.extend(rest)
    for extend in rest:
        reference = engine.plain_logits(texts[extend.session])[0][extend.position :]
        torch.testing.assert_close(run.logits(extend.session), reference, rtol=1e-4, atol=1e-4)
    engine.check()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_gathered_back_end_agrees_with_the_per_session_one(architecture: str) -> None:
    rows = []
    for backend in ("per_session", "gathered"):
        run = Driver(native_engine(ARCHITECTURES[architecture](), 1024, backend=backend))
        batches = [[(0, 30), (1, 3), (2, 1)], [(0, 1), (1, 4), (2, 4)], [(0, 1), (1, 1), (2, 1)]]
        for number, batch in enumerate(batches):
            run.engine.extend([run.make(session, tokens(count, number)) for session, count in batch])
            rows.append(run.engine.whole([0, 1, 2]))
    for one, other in zip(rows[:3], rows[3:], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["mistral", "gemma2"])
def test_a_rewind_within_and_past_a_sliding_window_leaves_no_trace(architecture: str) -> None:
    engine = native_engine(ARCHITECTURES[architecture](), 1024)
    run, text = Driver(engine), tokens(40)
    run.extend(1, text[:20])
    run.extend(1, tokens(15, seed=9))
    assert run.extend(1, text[20:], at=20) == Held(1, 40, 20)
    run.extend(1, tokens(5, seed=8), at=3)
    run.extend(1, text[3:], at=3)
    torch.testing.assert_close(run.logits(1), engine.plain_logits(text)[0][3:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["pieces", "grouped", "bytes"])
def test_logits_after_every_rollback_are_those_of_a_fresh_prefill(target: str) -> None:
    """A small model gets its own tokens of a text that a target with another vocabulary writes."""
    pair = alignment(target, "small")
    engine = native_engine(qwen2(), 1024)
    run, stream = Driver(engine), Stream(0, tokens(3))
    run.extend(1, stream.tokens)
    reader, taken_back = RetokenizingTranslator(pair, stream), 0
    for token in pair.target.encode("It isn't  12345 storys;\n\n  Größe, 日本語 don't")[0]:
        before = stream.tokens[:]
        reader.append(token)
        same = next((at for at, (a, b) in enumerate(zip(before, stream.tokens, strict=False)) if a != b), len(before))
        same = min(same, len(stream))
        taken_back += same < len(before)
        if stream.tokens == before:
            continue
        start = min(same, len(stream) - 1)
        assert run.extend(1, stream.tokens[start:], at=start) == Held(1, len(stream), len(stream) - start)
        torch.testing.assert_close(run.logits(1), engine.plain_logits(stream.tokens)[0][start:], rtol=1e-4, atol=1e-4)
    assert taken_back >= (0 if target == "grouped" else 1)
    engine.check()


def test_a_position_behind_the_cache_is_a_miss_with_its_length() -> None:
    run = driver()
    run.extend(1, tokens(5))
    prefix = extend_hashes(run.engine.hash_seed, tokens(9))[-1]
    assert run.engine.extend([Extend(1, 9, prefix, [3], 1, 0)]) == [KVMiss(1, 5)]
    assert run.engine.extend([Extend(2, 9, prefix, [3], 1, 0)]) == [KVMiss(2, 0)]
    assert run.extend(1, [4]) == Held(1, 6, 1)


def test_a_cache_of_other_tokens_is_a_miss_from_the_beginning() -> None:
    run = driver()
    run.extend(1, tokens(5))
    other = extend_hashes(run.engine.hash_seed, tokens(5, seed=1))[-1]
    assert run.engine.extend([Extend(1, 5, other, [3], 1, 0)]) == [KVMiss(1, 0)]
    assert run.engine.extend([Extend(2, 0, other, [3], 1, 0)]) == [KVMiss(2, 0)]


def test_an_evicted_session_is_a_miss_and_its_rows_stay_readable() -> None:
    run = driver()
    run.extend(1, tokens(5))
    before = run.logits(1)
    run.engine.evict(1)
    assert torch.equal(run.logits(1), before)
    assert run.extend(1, [3]) == KVMiss(1, 0)
    run.engine.close(1)
    assert run.engine.rows(1) is None
    run.engine.check()


def test_a_fork_continues_as_its_source() -> None:
    run, text = driver(), tokens(40)
    run.extend(1, text)
    blocks = run.blocks(1)
    run.tokens[2] = text[:32]
    assert run.engine.shared(blocks) == 2
    assert run.engine.fork(2, text[:32], blocks, 2)
    assert run.extend(2, [5, 6]) == Held(2, 34, 2)
    reference = run.engine.plain_logits([*text[:32], 5, 6])[0][32:]
    torch.testing.assert_close(run.logits(2), reference, rtol=1e-4, atol=1e-4)
    run.engine.check()


def test_dropped_blocks_are_not_shared() -> None:
    run, text = driver(), tokens(40)
    run.extend(1, text)
    blocks = run.blocks(1)
    run.extend(1, [3], at=31)
    assert run.engine.shared(blocks) == 1
    assert not run.engine.fork(2, text[:32], blocks, 2)
    run.engine.check()
    run.engine.evict(1)
    assert run.engine.shared(blocks) == 0
    assert not run.engine.fork(2, text[:16], blocks[:1], 2)
    run.engine.check()


def test_a_hash_alone_shares_nothing() -> None:
    run, text = driver(), tokens(16)
    run.extend(1, text)
    assert not run.engine.fork(2, [*text[:-1], text[-1] ^ 1], run.blocks(1), 2)
    assert run.engine.fork(2, text, run.blocks(1), 2)
    run.engine.check()


def test_a_fork_evicts_no_other_session() -> None:
    run, text = driver(cache_tokens=64), tokens(40)  # two units
    run.extend(1, text)
    blocks = run.blocks(1)
    assert not run.engine.fork(2, text[:32], blocks, 0)
    assert run.engine.fork(1, text[:32], blocks, 1)  # its own prompt, sent again
    assert run.extend(1, text[32:], at=32) == Held(1, 40, 8)
    assert run.engine.cache_stats().sessions == 1
    run.engine.check()


def test_the_youngest_sessions_go_first_and_the_oldest_progresses() -> None:
    run = driver(cache_tokens=128)  # four units
    for session in (1, 2, 3, 4):
        assert run.extend(session, tokens(20)) == Held(session, 20, 20)
    assert run.extend(2, tokens(20)) == Held(2, 40, 20)
    assert run.engine.cache_stats().sessions == 3
    assert run.extend(4, [1]) == KVMiss(4, 0)
    assert run.extend(3, [1]) == Held(3, 21, 1)
    assert run.extend(1, tokens(90)) == Held(1, 110, 90)
    assert run.extend(2, [1]) == KVMiss(2, 0)
    run.engine.check()


def test_a_younger_session_waits_when_there_is_no_room() -> None:
    run = driver(cache_tokens=128)
    run.extend(1, tokens(100))
    stats = run.engine.cache_stats()
    assert run.extend(2, tokens(3)) == Full(2)
    assert run.engine.cache_stats() == stats
    run.engine.close(1)
    run.tokens.clear()
    assert run.extend(2, tokens(3)) == Held(2, 3, 3)


def test_no_session_is_evicted_if_that_is_not_enough() -> None:
    run = driver(cache_tokens=128)
    run.extend(1, tokens(60))
    run.extend(3, tokens(30))
    assert run.extend(2, tokens(100)) == Full(2)
    assert run.extend(3, [1]) == Held(3, 31, 1)


def test_the_oldest_progresses_if_all_sessions_need_room() -> None:
    run = driver(cache_tokens=128)
    run.engine.extend([run.make(session, tokens(32)) for session in (1, 2, 3, 4)])
    outcomes = run.engine.extend([run.make(session, [1]) for session in (4, 3, 2, 1)])
    assert outcomes == [Full(4), Full(3), Held(2, 33, 1), Held(1, 33, 1)]
    assert run.extend(3, [1]) == KVMiss(3, 0)
    run.engine.check()


def test_equal_ages_progress_too() -> None:
    run = driver(cache_tokens=128)
    run.engine.extend([run.make(session, tokens(32), age=0) for session in (1, 2, 3, 4)])
    outcomes = run.engine.extend([run.make(session, [1], age=0) for session in (1, 2, 3, 4)])
    assert outcomes == [Held(1, 33, 1), Held(2, 33, 1), Full(3), Full(4)]


def test_a_failed_forward_drops_the_sessions_of_its_step_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    run = driver()
    for session in (1, 2, 3):
        run.extend(session, tokens(6, session))

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(run.engine.runner._attention.backend, "attend", broken)
        with pytest.raises(StepFailed, match="no memory") as failure:
            run.engine.extend([run.make(1, [1]), run.make(2, [1]), run.make(4, [1])])
    assert failure.value.sessions == (1, 2, 4)
    run.engine.check()
    assert run.engine.rows(1) is None
    assert run.extend(1, [2]) == KVMiss(1, 0)
    assert run.extend(3, [2]) == Held(3, 7, 1)
    assert run.engine.extend([run.make(2, tokens(3), at=0)]) == [Held(2, 3, 3)]


@pytest.mark.parametrize(
    ("extend", "why"),
    [
        (Extend(1, 0, 0, [], 0, 0), "at least one token"),
        (Extend(1, 0, 0, [1], 2, 0), "2 rows of 1 tokens"),
        (Extend(1, 0, 0, [1], -1, 0), "-1 rows"),
        (Extend(1, -1, 0, [1], 1, 0), "negative"),
        (Extend(1, 0, 0, [VOCABULARY], 1, 0), "token ids"),
        (Extend(1, 0, 0, [-1], 1, 0), "token ids"),
        (Extend(1, 100, 0, [1] * 29, 1, 0), "129 tokens do not fit a cache of 128"),
        (Extend(1, 0, 0, [1] * 20, 20, 0), "at most 16 are held"),
    ],
)
def test_an_impossible_extend_is_refused_and_changes_nothing(extend: Extend, why: str) -> None:
    run = driver(cache_tokens=128, max_held_rows=16)
    run.extend(7, tokens(3))
    before = run.logits(7)
    with pytest.raises(BadExtend, match=why):
        run.engine.extend([run.make(7, [1]), extend])
    assert torch.equal(run.logits(7), before)
    assert run.extend(7, [1], at=3) == Held(7, 4, 1)


def test_a_session_may_be_extended_once_in_a_step() -> None:
    run = driver()
    with pytest.raises(BadExtend, match="once"):
        run.engine.extend([run.make(1, [1]), run.make(1, [2])])


def test_extends_over_the_row_budget_wait_for_the_next_step() -> None:
    run = driver(max_held_rows=4)
    batch = [run.make(session, tokens(2)) for session in (3, 2, 1)]
    assert run.engine.extend(batch) == [Full(3), Held(2, 2, 2), Held(1, 2, 2)]
    assert run.engine.extend(batch[:1]) == [Held(3, 2, 2)]
    assert run.engine.rows(1) is None
    with pytest.raises(RowGone):
        run.engine.reduce([1], 4)
    run.engine.check()


def test_rows_are_named_by_position_and_own_token() -> None:
    run, text = driver(), tokens(8)
    run.extend(1, text, rows=3)
    rows = run.engine.rows(1)
    assert rows is not None
    hashes = extend_hashes(run.engine.hash_seed, text)
    assert (rows.position, rows.hashes) == (5, tuple(hashes[5:]))
    assert rows.whole().shape == (3, run.engine.width)
    assert rows.whole().dtype == np.float32


def test_a_chunk_of_prefill_needs_no_rows() -> None:
    run = driver()
    assert run.extend(1, tokens(4), rows=0) == Held(1, 4, 0)
    assert run.engine.rows(1) is None
    run.engine.check()


def test_reduce_gives_the_rows_of_many_sessions_in_order() -> None:
    run = driver()
    run.engine.extend([run.make(session, tokens(4, session), rows=session) for session in (1, 2, 3)])
    together = run.engine.reduce([3, 1], 8)
    parts = [rows.slices(8) for rows in (run.engine.rows(3), run.engine.rows(1)) if rows is not None]
    assert np.array_equal(together.ids, np.concatenate([part.ids for part in parts]))
    assert np.array_equal(together.logits, np.concatenate([part.logits for part in parts]))
    np.testing.assert_allclose(together.logsumexp, np.concatenate([part.logsumexp for part in parts]), rtol=1e-6)
    assert run.engine.whole([3, 1]).shape == (4, run.engine.width)
    assert run.engine.reduce([], 8).ids.shape == (0, 8)


def test_rows_can_be_read_from_another_thread_while_a_forward_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    run = driver()
    run.engine.extend([run.make(session, tokens(5, session)) for session in (1, 2)])
    before = run.logits(2)
    within, go_on = Event(), Event()
    attend: Any = run.engine.runner._attention.backend.attend

    def paused(*arguments: Any) -> torch.Tensor:
        within.set()
        assert go_on.wait(timeout=HANG_S)
        out: torch.Tensor = attend(*arguments)
        return out

    monkeypatch.setattr(run.engine.runner._attention.backend, "attend", paused)
    with ThreadPoolExecutor(1) as pool:
        forward = pool.submit(run.engine.extend, [run.make(1, [7])])
        assert within.wait(timeout=HANG_S)
        other, own = run.engine.rows(2), run.engine.rows(1)
        assert own is None  # its next extend has begun
        assert other is not None
        assert np.array_equal(other.whole(), before.numpy())
        assert np.array_equal(run.engine.values([(other, 4)], [2], np.array([1, 2])), before[4, [1, 2]].numpy())
        go_on.set()
        assert forward.result(timeout=HANG_S) == [Held(1, 6, 1)]
    assert np.array_equal(other.whole(), before.numpy())


def test_stats_count_whole_units() -> None:
    run = driver(cache_tokens=100)
    run.extend(1, tokens(33))
    stats = run.engine.cache_stats()
    assert (stats.tokens_total, stats.tokens_used, stats.sessions) == (96, 64, 1)


def test_a_deleted_engine_leaves_transformers_registry() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    engine = native_engine(qwen2(), 64)
    name = engine.runner._attention.name
    assert name in ALL_ATTENTION_FUNCTIONS
    del engine
    assert name not in ALL_ATTENTION_FUNCTIONS
