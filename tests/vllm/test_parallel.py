"""Two ranks of the vLLM engine on this machine's CPU (gloo), held against plain forwards; a lost rank is noticed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

from actors.engine.errors import LoadError
from actors.engine.loader import ModelSource
from actors.engine.parallel import FollowerProcess, RanksLost, Recipe, Rendezvous, load_parallel
from tests.engine.test_parallel import wait_until_lost
from tests.vllm.models import qwen3, saved
from tests.vllm.test_engine import CACHE, Script

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def no_ranks_afterwards() -> Iterator[None]:
    """vLLM remembers the ranks of this process, which the tests of one rank would meet."""
    yield
    destroy_model_parallel()
    destroy_distributed_environment()


def test_two_ranks_give_the_rows_of_plain_forwards_and_a_killed_one_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # ranks that share cores would wait for each other's threads
    path = saved(qwen3(), tmp_path / "model")
    source = ModelSource(str(path), dtype="float32", device="cpu", tensor_parallel=2)
    started: list[FollowerProcess] = []

    def start(recipe: Recipe, rendezvous: Rendezvous, rank: int) -> FollowerProcess:
        started.append(FollowerProcess(recipe, rendezvous, rank))
        return started[-1]

    engine = load_parallel(Recipe(source, CACHE), start, load_s=300, step_s=60)
    try:
        script = Script(engine, path, seed=4)
        assert script.run(20) < 1e-3
        engine.check_health()
        pid = started[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_until_lost(engine)
        with pytest.raises(RanksLost, match="rank 1"):
            engine.extend([script.extend(1, 0)])
    finally:
        engine.stop()
    assert not started[0].alive()


def test_heads_that_cannot_be_shared_out_are_refused_and_no_rank_is_left(tmp_path: Path) -> None:
    source = ModelSource(str(saved(qwen3(), tmp_path / "model")), device="cpu", tensor_parallel=3)
    started: list[FollowerProcess] = []

    def start(recipe: Recipe, rendezvous: Rendezvous, rank: int) -> FollowerProcess:
        started.append(FollowerProcess(recipe, rendezvous, rank))
        return started[-1]

    with pytest.raises(LoadError, match=r"attention heads \(4\).*size \(3\).*Set another tensor_parallel"):
        load_parallel(Recipe(source, CACHE), start, load_s=120, step_s=60)
    assert not any(follower.alive() for follower in started)
