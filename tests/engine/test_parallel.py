"""How rank 0 leads the others: they apply what it does, in order, and one that is lost is noticed.

Here every rank is a thread with a whole model. Real ranks, each with its share, are in tests/vllm/test_parallel.py.
"""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Client, Connection
from typing import Any

import msgpack
import pytest

from actors.engine.errors import LoadError
from actors.engine.interface import Held, KVMiss, Outcome
from actors.engine.loader import ModelSource
from actors.engine.native_runner import NativeRunner
from actors.engine.parallel import FOLLOWED, FollowingEngine, ParallelEngine, apply_operation
from actors.engine.ranks import LOOPBACK, Followers, RanksLost, Recipe, Rendezvous
from actors.engine.runner import Runner
from actors.engine.step_engine import StepEngine
from tests.support.tiny_models import Driver, qwen2, tokens

CACHE = 128  # four units: eviction happens
RECIPE = Recipe(ModelSource("some/model", tensor_parallel=2), CACHE)
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


class ThreadFollower:
    """Rank 1 as a thread: `work` gets its end of the connection once it has called the leader."""

    def __init__(self, rendezvous: Rendezvous, work: Callable[[Connection], None]) -> None:
        self._rendezvous, self._work = rendezvous, work
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with Client((LOOPBACK, self._rendezvous.operations_port), authkey=self._rendezvous.key) as pipe:
            pipe.send_bytes(msgpack.packb(1))
            self._work(pipe)

    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        self._thread.join(10)


def followers(work: Callable[[Connection], None], load_s: float = 10.0) -> Followers:
    return Followers(RECIPE, lambda _, rendezvous, __: ThreadFollower(rendezvous, work), load_s, 10.0)


def applied_to(engine: StepEngine[Any]) -> Callable[[Connection], None]:
    """The work of a follower that applies every operation to `engine`."""

    def work(pipe: Connection) -> None:
        pipe.send_bytes(msgpack.packb(""))
        try:
            while True:
                apply_operation(engine, pipe.recv_bytes())
        except EOFError:
            return

    return work


def story(engine: StepEngine[Any]) -> list[Outcome]:
    """Prefill in chunks, ragged decoding of two sessions, a rewind, a fork, a refusal and an eviction."""
    run = Driver(engine)
    outcomes: list[Outcome] = []

    def step(*extends: dict[str, Any]) -> None:
        outcomes.extend(engine.extend([run.make(**extend) for extend in extends]))

    step({"session": 1, "new": tokens(11), "rows": 0}, {"session": 2, "new": tokens(3, 1)})
    step({"session": 1, "new": tokens(9, 2), "rows": 2}, {"session": 2, "new": [5]})
    for _ in range(6):
        step(*({"session": session, "new": [int(run.logits(session)[-1].argmax())]} for session in (1, 2)))
    step({"session": 1, "new": tokens(4, 3), "at": 15})
    run.tokens[3] = run.tokens[1][:16]
    assert engine.fork(3, run.tokens[3], run.blocks(3), 3)
    step({"session": 3, "new": tokens(3, 4)}, {"session": 2, "new": [7, 8]})
    step({"session": 1, "new": tokens(80, 5), "rows": 1})  # 3, the youngest, must go
    step({"session": 3, "new": [1]})
    engine.evict(2)
    step({"session": 2, "new": [1]})
    engine.close(1)
    step({"session": 2, "new": tokens(6, 6), "at": 0})
    engine.check()
    assert {type(outcome) for outcome in outcomes} == {Held, KVMiss}
    return outcomes


def runner() -> Runner:
    return NativeRunner(qwen2(), CACHE)


def test_the_other_ranks_hold_what_rank_0_holds() -> None:
    other = FollowingEngine(runner(), 64)
    led = followers(applied_to(other))
    led.wait_for_all("load")
    engine = ParallelEngine(led, runner(), 64)
    outcomes = story(engine)
    engine.check_health()
    engine.stop()
    assert outcomes == story(StepEngine(runner(), 64))
    other.check()
    assert other.runner.cache.sessions() == engine.runner.cache.sessions()
    for session in engine.runner.cache.sessions():
        assert other.runner.cache.length(session) == engine.runner.cache.length(session)
        assert other.rows(session) is None
    with pytest.raises(RanksLost, match="stopped"):
        engine.close(1)


def wait_until_lost(engine: ParallelEngine) -> None:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            engine.check_health()
        except RanksLost:
            return
        time.sleep(0.005)
    raise AssertionError("no rank was lost")


@pytest.mark.parametrize(
    ("last", "said"),
    [(msgpack.packb("RuntimeError: no memory"), "rank 1: RuntimeError: no memory"), (None, "rank 1 ended")],
)
def test_a_rank_that_fails_or_ends_is_noticed_and_no_call_waits_for_it(last: bytes | None, said: str) -> None:
    def work(pipe: Connection) -> None:
        pipe.recv_bytes()
        if last is not None:
            pipe.send_bytes(last)

    engine = ParallelEngine(followers(work), runner(), 64)
    Driver(engine).extend(1, tokens(5))
    wait_until_lost(engine)
    with pytest.raises(RanksLost, match=said):
        engine.close(1)
    engine.stop()


def test_an_error_of_rank_0_alone_leaves_the_ranks_out_of_step(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ParallelEngine(followers(applied_to(FollowingEngine(runner(), 64))), runner(), 64)
    monkeypatch.setattr(engine.runner, "forward", lambda admitted: 1 / 0)
    with pytest.raises(RanksLost, match="rank 0"):
        Driver(engine).extend(1, tokens(5))
    wait_until_lost(engine)
    engine.stop()


def test_a_rank_that_ends_while_it_loads_is_an_error_at_once() -> None:
    led = followers(lambda pipe: None, load_s=60)
    with pytest.raises(LoadError, match="rank 1 ended"):
        led.wait_for_all("load")
    led.stop()


def test_a_rank_that_is_silent_is_an_error_after_the_deadline() -> None:
    released = threading.Event()

    def work(_: Connection) -> None:
        released.wait(10)

    led = followers(work, load_s=0.3)
    with pytest.raises(LoadError, match=r"ranks \[1\] are silent.*model_load_s"):
        led.wait_for_all("load")
    released.set()
    led.stop()


def test_every_operation_is_followed_by_all_ranks_or_is_rank_0s_alone() -> None:
    operations = {name for name, _ in inspect.getmembers(StepEngine, inspect.isfunction) if not name.startswith("_")}
    assert operations == FOLLOWED | ALONE
    assert FOLLOWED <= ParallelEngine.__dict__.keys()
