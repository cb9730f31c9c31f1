"""Claims of batch_invariant mode: in any batch, a row has the bits of decoding its session alone, token by token."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from actors.engine.errors import LoadError
from actors.engine.interface import BLOCK, KEEP_ALL, Held, KVMiss
from actors.engine.native_runner import native_engine
from actors.engine.rows import gather_rows
from tests.support.deadlines import HANG_S
from tests.support.tiny_models import ARCHITECTURES, VOCABULARY, Driver, qwen2, tokens

SESSIONS = 5
PROMPTS = {session: tokens(9 + 11 * session, 100 + session) for session in range(SESSIONS)}
TEXTS = {session: tokens(24, 200 + session) for session in range(SESSIONS)}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def alone(request: pytest.FixtureRequest) -> tuple[str, dict[int, torch.Tensor]]:
    """The rows [24, V] of every text's tokens, each session in an engine of its own."""
    run = Driver(native_engine(ARCHITECTURES[request.param](), 2048, batch_invariant=True))
    reference = {}
    for session in range(SESSIONS):
        for token in PROMPTS[session]:
            run.extend(session, [token], rows=0)
        rows = []
        for token in TEXTS[session]:
            run.extend(session, [token])
            rows.append(run.logits(session))
        reference[session] = torch.cat(rows)
        run.engine.close(session)
    return request.param, reference


def test_chunked_prefill_and_rejected_drafts_leave_no_bit_changed(alone: tuple[str, dict[int, torch.Tensor]]) -> None:
    architecture, reference = alone
    engine = native_engine(ARCHITECTURES[architecture](), 2048, batch_invariant=True)
    run, draw = Driver(engine), random.Random(3)
    prompts = {session: list(prompt) for session, prompt in PROMPTS.items()}
    at = dict.fromkeys(range(SESSIONS), 0)
    while min(at.values()) < 24:
        batch, verified = [], {}
        for session in draw.sample(range(SESSIONS), SESSIONS):
            if prompts[session]:
                count = draw.randint(1, 17)
                chunk, prompts[session] = prompts[session][:count], prompts[session][count:]
                batch.append(run.make(session, chunk, rows=0))
            elif at[session] < 24:
                count = min(draw.randint(1, 5), 24 - at[session])
                wrong = [draw.randrange(VOCABULARY) for _ in range(draw.randint(0, 3))]
                position = len(PROMPTS[session]) + at[session]
                batch.append(run.make(session, TEXTS[session][at[session] :][:count] + wrong, at=position))
                verified[session] = count
        engine.extend(batch)
        for session, count in verified.items():
            expected = reference[session][at[session] : at[session] + count]
            assert torch.equal(run.logits(session)[:count], expected)
            at[session] += count
    engine.check()


def test_eviction_and_forks_leave_no_bit_changed(alone: tuple[str, dict[int, torch.Tensor]]) -> None:
    architecture, reference = alone
    engine = native_engine(ARCHITECTURES[architecture](), 2048, batch_invariant=True)
    run = Driver(engine)
    engine.extend([run.make(session, PROMPTS[session], rows=0) for session in range(SESSIONS)])
    for step in range(12):
        if step == 4:
            for session in (0, 2):
                engine.evict(session)
                assert run.extend(session, [1]) == KVMiss(session, 0)
                whole = PROMPTS[session] + TEXTS[session][:step]
                assert run.extend(session, whole, rows=0, at=0) == Held(session, len(whole), 0)
        if step == 8:
            for session in (1, 3):
                whole, blocks = list(run.tokens[session]), run.blocks(session)
                head = len(blocks) * BLOCK
                assert engine.fork(session + 50, whole[:head], blocks, 0)
                engine.close(session)
                assert engine.fork(session, whole[:head], blocks, 0)
                engine.close(session + 50)
                assert run.extend(session, whole[head:], rows=0, at=head) == Held(session, len(whole), 0)
        engine.extend([run.make(session, [TEXTS[session][step]]) for session in range(SESSIONS)])
        for session in range(SESSIONS):
            assert torch.equal(run.logits(session)[0], reference[session][step])


def test_rows_of_drafts_and_after_rejections_have_the_bits_of_decoding(
    alone: tuple[str, dict[int, torch.Tensor]],
) -> None:
    architecture, reference = alone
    engine = native_engine(ARCHITECTURES[architecture](), 2048, batch_invariant=True)
    run, draw = Driver(engine), random.Random(5)
    engine.extend([run.make(session, PROMPTS[session], rows=0) for session in range(SESSIONS)])
    at = 0
    while at < 20:
        good, wrong = draw.randint(1, 3), draw.randint(0, 3)
        for step in range(good + wrong):
            batch = []
            for session in range(SESSIONS):
                token = TEXTS[session][at + step] if step < good else draw.randrange(VOCABULARY)
                position = len(PROMPTS[session]) + at + step
                batch.append(run.make(session, [token], at=position)._replace(keep=step and KEEP_ALL))
            engine.extend(batch)
        for session in range(SESSIONS):
            held = engine.rows(session)
            assert held is not None
            assert held.size == good + wrong
            assert torch.equal(gather_rows(held.places)[:good], reference[session][at : at + good])
            assert engine.reduce([session], 8).ids.shape == (1, 8)
        at += good
    engine.check()


def test_slices_do_not_depend_on_company() -> None:
    engine = native_engine(qwen2(), 2048, batch_invariant=True)
    run = Driver(engine)
    engine.extend([run.make(session, tokens(5 + session, session), rows=3) for session in range(9)])
    together = engine.reduce(range(9), 64)
    for session in range(9):
        single, rows = engine.reduce([session], 64), slice(3 * session, 3 * session + 3)
        assert np.array_equal(single.ids, together.ids[rows])
        assert single.logits.tobytes() == together.logits[rows].tobytes()
        assert single.logsumexp.tobytes() == together.logsumexp[rows].tobytes()


def test_the_thread_that_runs_the_forward_does_not_matter() -> None:
    engine = native_engine(qwen2(), 2048, batch_invariant=True)
    run, text = Driver(engine), tokens(30)
    run.extend(1, text)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run.extend, 2, text).result(timeout=HANG_S)
    assert torch.equal(run.logits(1), run.logits(2))


def test_batch_invariant_mode_needs_float32_on_the_cpu() -> None:
    with pytest.raises(LoadError, match="batch_invariant mode"):
        native_engine(qwen2().bfloat16(), 64, batch_invariant=True)
