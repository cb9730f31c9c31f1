"""Two ranks on this machine's CPU (gloo) against one: the same tokens, and a loss that is noticed."""

from __future__ import annotations

import inspect
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from actors.engine.errors import LoadError
from actors.engine.loader import ModelSource, load_engine
from actors.engine.parallel import FOLLOWED, FollowerProcess, ParallelEngine, RanksLost, Recipe, Rendezvous, load_parallel
from actors.engine.shards import refuse_ranks
from actors.engine.step_engine import Full, Held, KVMiss, StepEngine
from tests.engine.models import Driver, llama, qwen2, tokens

# The loopback sockets of the process group are torch's own, and so are its warnings about them.
pytestmark = [pytest.mark.filterwarnings("ignore::ResourceWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

CACHE = 128  # four units: eviction happens
ALONE = {"check", "check_batch", "check_extend", "check_health", "cache_stats", "reduce", "rows", "whole"}


class Started:
    """Starts followers and remembers them."""

    def __init__(self) -> None:
        self.followers: list[FollowerProcess] = []

    def __call__(self, recipe: Recipe, rendezvous: Rendezvous, rank: int) -> FollowerProcess:
        self.followers.append(FollowerProcess(recipe, rendezvous, rank))
        return self.followers[-1]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ranks that share cores only wait for one another's threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recipe(folder: Path, dtype: str = "float32", ranks: int = 2) -> Recipe:
    return Recipe(ModelSource(str(folder), dtype=dtype, device="cpu", tensor_parallel=ranks), CACHE)


def story(engine: StepEngine) -> tuple[list[object], list[torch.Tensor]]:
    """Prefill in chunks, ragged decoding of two sessions, a rewind, a fork, a refusal and an eviction."""
    run, outcomes, rows = Driver(engine), [], []

    def step(*extends: object) -> None:
        batch = [run.make(**extend) for extend in extends]  # type: ignore[arg-type]
        outcomes.extend(engine.extend(batch))
        rows.extend(run.logits(extend.session) for extend in batch if extend.rows)

    step({"session": 1, "new": tokens(11), "rows": 0}, {"session": 2, "new": tokens(3, 1)})
    step({"session": 1, "new": tokens(9, 2), "rows": 2}, {"session": 2, "new": [5]})
    for _ in range(6):
        chosen = [int(run.logits(session)[-1].argmax()) for session in (1, 2)]
        step(*({"session": session, "new": [token]} for session, token in zip((1, 2), chosen, strict=True)))
    step({"session": 1, "new": tokens(4, 3), "at": 15})
    run.tokens[3] = run.tokens[1][:10]
    assert engine.fork(1, 3, 10)
    step({"session": 3, "new": tokens(3, 4)}, {"session": 2, "new": [7, 8]})
    outcomes += engine.extend([run.make(1, tokens(80, 5), rows=1)])  # 3, the youngest, must go
    rows.append(run.logits(1))
    outcomes += engine.extend([run.make(3, [1])])
    engine.evict(2)
    outcomes += engine.extend([run.make(2, [1])])
    engine.close(1)
    step({"session": 2, "new": tokens(6, 6), "at": 0})
    engine.check()
    return outcomes, rows


@pytest.mark.parametrize(("make", "dtype"), [(qwen2, "float32"), (llama, "float32"), (qwen2, "bfloat16")])
def test_two_ranks_give_the_tokens_of_one(make: object, dtype: str, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)  # type: ignore[operator]
    source = ModelSource(str(tmp_path), dtype=dtype, device="cpu")
    alone = load_engine(source, CACHE)
    started = Started()
    engine = load_parallel(recipe(tmp_path, dtype), started, load_s=60, step_s=20)
    try:
        assert engine.hash_seed == alone.hash_seed  # the digest of the whole
        pools = [next(iter(each._pool.layers.values()))[0] for each in (engine, alone)]
        assert [pool.shape[1] for pool in pools] == [1, 2]  # a rank's share of the heads
        expected, outcomes = story(alone), story(engine)
    finally:
        engine.stop()
    assert not any(follower.alive() for follower in started.followers)
    assert outcomes[0] == expected[0]
    assert {type(outcome) for outcome in outcomes[0]} == {Held, KVMiss}
    for mine, theirs in zip(outcomes[1], expected[1], strict=True):
        assert mine.dtype == torch.float32
        if dtype == "float32":
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
            assert torch.equal(mine.argmax(-1), theirs.argmax(-1))
