"""Tensor parallelism: one engine of vLLM over several ranks of a node, each with its share of heads, weights and cache.

Rank 0 decides and holds the rows. The effect of an operation depends only on the operations before it, so the other
ranks follow by applying the same operations in the same order to their shares; nothing else is sent to them.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Client, Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import msgpack
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from actors.engine.errors import EngineError, LoadError
from actors.engine.interface import Extend, Outcome
from actors.engine.loader import Report, device_of
from actors.engine.ranks import LOOPBACK, Followers, RanksLost, Recipe, Rendezvous, StartFollower, join_group
from actors.engine.runner import Runner
from actors.engine.selfcheck import verify_engine
from actors.engine.step_engine import StepEngine

__all__ = ["FOLLOWED", "FollowerProcess", "ParallelEngine", "RanksLost", "Recipe", "Rendezvous", "StartFollower"]
__all__ += ["follow", "load_parallel"]

if TYPE_CHECKING:
    from actors.engine.vllm_runner import VllmRunner

T = TypeVar("T")

# Operations that change a session or run a forward, which every rank must apply; rank 0 does the others alone.
FOLLOWED = frozenset({"extend", "close", "evict", "fork", "plain_logits"})
_GRACE_S = 5.0  # a follower without a leader ends itself after so long, whatever it computes


class FollowerProcess:
    """A follower as a child process, where there is no Ray."""

    def __init__(self, recipe: Recipe, rendezvous: Rendezvous, rank: int) -> None:
        self._process = get_context("spawn").Process(
            target=follow, args=(recipe, rendezvous, rank), name=f"rank-{rank}", daemon=True
        )
        self._process.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def alive(self) -> bool:
        return self._process.is_alive()

    def stop(self) -> None:
        self._process.join(_GRACE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


class ParallelEngine(StepEngine[Runner]):
    """Rank 0: a step engine whose operations the other ranks follow. Call `stop` when done."""

    def __init__(self, followers: Followers, runner: Runner, max_held_rows: int) -> None:
        self._followers = followers
        super().__init__(runner, max_held_rows)

    def extend(self, batch: Sequence[Extend]) -> list[Outcome]:
        self.check_batch(batch)  # refused before it is sent
        return self._on_all_ranks("extend", super().extend, batch, wire=[_packed(extend) for extend in batch])

    def close(self, session: int) -> None:
        self._on_all_ranks("close", super().close, session)

    def evict(self, session: int) -> None:
        self._on_all_ranks("evict", super().evict, session)

    def fork(self, session: int, tokens: Sequence[int], blocks: Sequence[int], age: int) -> bool:
        return self._on_all_ranks("fork", super().fork, session, list(tokens), list(blocks), age)

    def plain_logits(self, tokens: Sequence[int]) -> list[Tensor]:
        return self._on_all_ranks("plain_logits", super().plain_logits, list(tokens))

    def check_health(self) -> None:
        """Raise RanksLost once a rank has died or fallen out of step."""
        self._followers.check()

    def stop(self) -> None:
        """End the other ranks."""
        self._followers.stop()

    def _on_all_ranks(self, operation: str, local: Callable[..., T], *arguments: Any, wire: Any = None) -> T:
        """Apply an operation on every rank. After an error other than ValueError the ranks stay out of step."""
        self._followers.broadcast(operation, *(arguments if wire is None else [wire]))
        try:
            return local(*arguments)
        except ValueError:
            raise  # refused by the session table, on every rank alike
        except Exception as error:
            raise self._followers.mark_lost(f"rank 0: {error}") from error


class FollowingEngine(StepEngine[Runner]):
    """Any other rank: it computes its share and holds no rows."""

    def _hold(self, admitted: Sequence[Extend], logits: Tensor) -> None:
        pass


def load_parallel(
    recipe: Recipe,
    start: StartFollower = FollowerProcess,
    *,
    load_s: float = 1_800.0,
    step_s: float = 60.0,
    report: Report | None = None,
) -> ParallelEngine:
    """Start the other ranks, load every rank's share and hold the whole against a plain forward.

    load_s: for every rank to start, and again to load. step_s: for one collective. LoadError if any of it cannot be.
    """
    device = device_of(recipe.source)
    followers = Followers(recipe, start, load_s, step_s)
    try:
        join_group(followers.store, 0, recipe.ranks, device, step_s)
        runner = _load_share(recipe, 0, report)
        followers.wait_for_all("load")
        engine = ParallelEngine(followers, runner, recipe.max_held_rows)
        others = [followers.store.get(_device_key(rank)).decode() for rank in range(1, recipe.ranks)]
        engine.devices = [*engine.devices, *others]
        verify_engine(engine, recipe.source.path)
    except BaseException as error:
        followers.stop()
        if isinstance(error, RuntimeError) and not isinstance(error, LoadError):
            raise LoadError(recipe.source.path, f"its ranks failed: {error}", "Look at their logs.") from error
        raise
    return engine


def follow(recipe: Recipe, rendezvous: Rendezvous, rank: int) -> None:
    """Run rank `rank` until the leader is gone. An error is sent to the leader, then raised."""
    pipe = Client((LOOPBACK, rendezvous.operations_port), authkey=rendezvous.key)
    operations: SimpleQueue[bytes | None] = SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, operations), name="leader", daemon=True).start()
    pipe.send_bytes(msgpack.packb(rank))
    try:
        store = TCPStore(LOOPBACK, rendezvous.store_port, recipe.ranks, False, timedelta(seconds=rendezvous.load_s))
        join_group(store, rank, recipe.ranks, device_of(recipe.source), rendezvous.step_s)
        runner = _load_share(recipe, rank)
        store.set(_device_key(rank), runner.devices[0])
        pipe.send_bytes(msgpack.packb(""))  # loaded
        engine = FollowingEngine(runner, recipe.max_held_rows)
        while (message := operations.get()) is not None:
            apply_operation(engine, message)
    except Exception as error:
        pipe.send_bytes(msgpack.packb(f"{type(error).__name__}: {error}"))
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        pipe.close()


def apply_operation(engine: StepEngine[Any], message: bytes) -> None:
    """Apply one operation that the leader has sent."""
    operation, *arguments = msgpack.unpackb(message)
    if operation not in FOLLOWED:
        raise EngineError(f"{operation!r} is no operation of a follower")
    if operation == "extend":
        arguments = [[Extend(*values) for values in arguments[0]]]
    with contextlib.suppress(ValueError):  # refused on every rank alike
        getattr(engine, operation)(*arguments)


def _device_key(rank: int) -> str:
    return f"device of rank {rank}"


def _load_share(recipe: Recipe, rank: int, report: Report | None = None) -> VllmRunner:
    """Load a rank's share of the model; all ranks call this together."""
    from actors.engine.vllm_runner import load_runner  # only the environment of such a role has vLLM

    return load_runner(recipe.source, recipe.cache_tokens, report, rank=rank)


def _packed(extend: Extend) -> tuple[Any, ...]:
    """An extend's fields in their order, as msgpack takes them: tokens may be numpy's."""
    tokens = [int(token) for token in extend.tokens]
    return extend.session, extend.position, extend.prefix, tokens, extend.rows, extend.age


def _receive(pipe: Connection, operations: SimpleQueue[bytes | None]) -> None:
    """Queue the leader's messages. When it is gone, even a rank that waits in a collective must end."""
    try:
        while True:
            operations.put(pipe.recv_bytes())
    except (OSError, EOFError, TypeError):
        operations.put(None)
    time.sleep(_GRACE_S)
    if dist.is_initialized():
        os._exit(1)
