"""Two ranks on this machine's CPU (gloo) compared with one: the same tokens, and a lost rank is noticed."""

from __future__ import annotations

import inspect
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.engine.errors import LoadError
from actors.engine.interface import Held, KVMiss, Outcome
from actors.engine.loader import ModelSource, load_engine
from actors.engine.parallel import (
    FOLLOWED,
    FollowerProcess,
    ParallelEngine,
    RanksLost,
    Recipe,
    Rendezvous,
    load_parallel,
)
from actors.engine.shards import refuse_ranks
from actors.engine.step_engine import StepEngine
from tests.support.tiny_models import Driver, llama, qwen2, tokens

# The loopback sockets of the process group are torch's own, and so are its warnings about them.
pytestmark = [pytest.mark.filterwarnings("ignore::ResourceWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

CACHE = 128  # four units: eviction happens
ALONE = {
    "cache_stats",
    "check",
    "check_batch",
    "check_extend",
    "check_health",
    "reduce",
    "rows",
    "shared",
    "values",
    "whole",
}


class Started:
    """Starts followers and keeps their handles."""

    def __init__(self) -> None:
        self.followers: list[FollowerProcess] = []

    def __call__(self, recipe: Recipe, rendezvous: Rendezvous, rank: int) -> FollowerProcess:
        self.followers.append(FollowerProcess(recipe, rendezvous, rank))
        return self.followers[-1]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread: ranks that share cores would wait for each other's threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recipe(folder: Path, dtype: str = "float32", ranks: int = 2) -> Recipe:
    return Recipe(ModelSource(str(folder), dtype=dtype, device="cpu", tensor_parallel=ranks), CACHE)


def story(engine: StepEngine[Any]) -> tuple[list[Outcome], list[torch.Tensor]]:
    """Prefill in chunks, ragged decoding of two sessions, a rewind, a fork, a refusal and an eviction."""
    run = Driver(engine)
    outcomes: list[Outcome] = []
    rows: list[torch.Tensor] = []

    def step(*extends: dict[str, Any]) -> None:
        batch = [run.make(**extend) for extend in extends]
        outcomes.extend(engine.extend(batch))
        rows.extend(run.logits(extend.session) for extend in batch if extend.rows)

    step({"session": 1, "new": tokens(11), "rows": 0}, {"session": 2, "new": tokens(3, 1)})
    step({"session": 1, "new": tokens(9, 2), "rows": 2}, {"session": 2, "new": [5]})
    for _ in range(6):
        chosen = [int(run.logits(session)[-1].argmax()) for session in (1, 2)]
        step(*({"session": session, "new": [token]} for session, token in zip((1, 2), chosen, strict=True)))
    step({"session": 1, "new": tokens(4, 3), "at": 15})
    run.tokens[3] = run.tokens[1][:16]
    assert engine.fork(3, run.tokens[3], run.blocks(3), 3)
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


def test_two_ranks_give_the_tokens_of_one(tmp_path: Path) -> None:
    qwen2().save_pretrained(tmp_path)
    alone = load_engine(ModelSource(str(tmp_path), device="cpu"), CACHE)
    started = Started()
    engine = load_parallel(recipe(tmp_path), started, load_s=90, step_s=20)
    try:
        assert engine.hash_seed == alone.hash_seed  # the digest of the whole
        runners: list[Any] = [engine.runner, alone.runner]
        pools = [next(iter(runner.cache.layers.values()))[0] for runner in runners]
        assert [pool.shape[1] for pool in pools] == [1, 2]  # a rank's share of the heads
        expected, outcomes = story(alone), story(engine)
        engine.check_health()
    finally:
        engine.stop()
    assert not any(follower.alive() for follower in started.followers)
    assert outcomes[0] == expected[0]
    assert {type(outcome) for outcome in outcomes[0]} == {Held, KVMiss}
    for mine, theirs in zip(outcomes[1], expected[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        assert torch.equal(mine.argmax(-1), theirs.argmax(-1))
    with pytest.raises(RanksLost, match="stopped"):
        engine.close(1)


def lost(engine: ParallelEngine) -> bool:
    try:
        engine.check_health()
    except RanksLost:
        return True
    return False


@pytest.mark.slow
def test_a_killed_rank_is_noticed_and_no_call_waits_for_it(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)  # a head of its own, in 16 bits
    started = Started()
    engine = load_parallel(recipe(tmp_path, "bfloat16"), started, load_s=90, step_s=20)
    try:
        run = Driver(engine)
        run.extend(1, tokens(5))
        assert run.logits(1).dtype == torch.float32
        pid = started.followers[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        while not lost(engine):
            assert time.monotonic() < began + 10
            time.sleep(0.01)
        with pytest.raises(RanksLost, match="rank 1"):
            run.extend(1, [3])
        assert time.monotonic() < began + 10
    finally:
        engine.stop()
    assert not started.followers[0].alive()


@pytest.mark.slow
def test_a_follower_that_does_not_start_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    missing = Recipe(ModelSource(str(tmp_path / "nowhere"), device="cpu", tensor_parallel=2), CACHE)
    started = Started()
    with pytest.raises(LoadError, match="nowhere"):
        load_parallel(missing, started, load_s=90, step_s=20)
    assert not any(follower.alive() for follower in started.followers)


def test_indivisible_heads_are_refused_with_possible_rank_counts() -> None:
    config = {"num_attention_heads": 12, "num_key_value_heads": 2}
    refuse_ranks(config, 2, "some/model")
    with pytest.raises(LoadError, match=r"2 key and value heads .* 4 ranks. Set tensor_parallel: to 1 or 2\."):
        refuse_ranks(config, 4, "some/model")


def test_every_operation_is_followed_by_all_ranks_or_is_rank_0s_alone() -> None:
    operations = {name for name, _ in inspect.getmembers(StepEngine, inspect.isfunction) if not name.startswith("_")}
    assert operations == FOLLOWED | ALONE
    assert FOLLOWED <= ParallelEngine.__dict__.keys()
