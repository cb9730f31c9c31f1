"""Tensor parallelism: one engine over several ranks of one node, each with its share of the heads, weights and cache.

Rank 0 decides and holds the rows. What becomes of a verb is a function of the verbs before it, so every other rank
follows by doing the same verbs in the same order on its own share; nothing but the verbs is sent to it.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from datetime import timedelta
from multiprocessing import AuthenticationError, get_context
from multiprocessing.connection import Client, Connection, Listener
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import msgpack
import torch
import torch.distributed as dist
from torch import Tensor

from actors.engine.digest import model_digest
from actors.engine.errors import EngineError, LoadError
from actors.engine.loader import ModelSource, Report, load_model
from actors.engine.rows import HeldRows
from actors.engine.selfcheck import verify_engine
from actors.engine.shards import LOOPBACK, device_kind, join_group, use_local_shares
from actors.engine.step_engine import StepEngine
from actors.engine.verbs import Extend, Outcome

log = logging.getLogger(__name__)

# What changes a session or runs a forward, and so must be done by every rank; the rest is rank 0's alone.
FOLLOWED = frozenset({"extend", "close", "evict", "fork", "plain_logits"})
_TURN_S = 0.1  # how often a wait looks whether those that it waits for still live
_GRACE_S = 5.0  # a follower without a leader ends itself after so long, whatever it computes


class RanksLost(EngineError):
    """A rank died or fell out of step: the engine cannot go on, and its process must be replaced."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What every rank needs to build its share of an engine."""

    source: ModelSource
    cache_tokens: int
    backend: str | None = None
    max_held_rows: int = 1024

    @property
    def ranks(self) -> int:
        return self.source.tensor_parallel


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where a follower finds its leader: loopback ports of the node that they share."""

    verbs_port: int
    store_port: int
    key: bytes  # by which the two ends of a verb connection know each other
    load_s: float  # the leader waits so long for its followers to load
    step_s: float  # a collective that waits longer ends the ranks


class Follower(Protocol):
    """A process in which `follow` runs."""

    def alive(self) -> bool: ...
    def stop(self) -> None:
        """End it, if it has not ended by itself."""


StartFollower = Callable[[Recipe, Rendezvous, int], Follower]


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


class Followers:
    """The leader's end of every other rank: sends verbs, hears of failures."""

    def __init__(self, recipe: Recipe, start: StartFollower, load_s: float, step_s: float) -> None:
        """Start the followers and wait until each has called; raises LoadError if one does not in time."""
        self._what = recipe.source.path
        self._lost: str | None = None
        self._stopping = False
        self._ready: SimpleQueue[int] = SimpleQueue()
        self._pipes: dict[int, Connection] = {}
        self._handles: dict[int, Follower] = {}
        self._load_s, key = load_s, secrets.token_bytes(32)
        self._listener = Listener((LOOPBACK, 0), authkey=key)
        plain = socket.create_server((LOOPBACK, 0))  # torch itself would listen on every address
        port = plain.getsockname()[1]
        self.store = dist.TCPStore(
            LOOPBACK, port, recipe.ranks, True, timedelta(seconds=load_s), False, master_listen_fd=plain.detach()
        )
        self.rendezvous = Rendezvous(self._listener.address[1], port, key, load_s, step_s)
        try:
            for rank in range(1, recipe.ranks):
                self._handles[rank] = start(recipe, self.rendezvous, rank)
            threading.Thread(target=self._accept, args=(recipe.ranks - 1,), name="ranks", daemon=True).start()
            self.wait_for_all("start")
        except BaseException:
            self.stop()
            raise

    def wait_for_all(self, what: str) -> None:
        """Wait until every follower has said that it is so far; LoadError if one is lost or takes too long."""
        until, missing = time.monotonic() + self._load_s, set(self._handles)
        while missing:
            try:
                missing.discard(self._ready.get(timeout=_TURN_S))
            except Empty:
                dead = [rank for rank in missing if not self._handles[rank].alive()]
                if self._lost or dead or time.monotonic() > until:
                    why = self._lost or (f"rank {dead[0]} ended" if dead else f"ranks {sorted(missing)} are silent")
                    out = "Look at the log of that rank; raise deadlines.model_load_s if it only needs longer."
                    raise LoadError(f"{self._what} over {len(self._handles) + 1} ranks", why, out) from None

    def tell(self, verb: str, *arguments: Any) -> None:
        """Send a verb to every follower. Raises RanksLost."""
        self.check()
        message = msgpack.packb([verb, *arguments])
        for rank, pipe in self._pipes.items():
            try:
                pipe.send_bytes(message)
            except OSError as error:
                raise self.lose(f"rank {rank} is gone: {error}") from error

    def lose(self, why: str) -> RanksLost:
        """The ranks are out of step from here on; the first reason stays."""
        self._lost = self._lost or why
        return RanksLost(f"{self._what}: {self._lost}")

    def check(self) -> None:
        """Raise RanksLost once a follower is lost."""
        if self._lost:
            raise RanksLost(f"{self._what}: {self._lost}")

    def stop(self) -> None:
        """End every follower and forget the process group."""
        self._stopping = True
        self._lost = self._lost or "it was stopped"
        self._listener.close()
        for pipe in self._pipes.values():
            pipe.close()
        for handle in self._handles.values():
            handle.stop()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _accept(self, count: int) -> None:
        while len(self._pipes) < count and not self._stopping:
            try:
                pipe = self._listener.accept()
                rank = msgpack.unpackb(pipe.recv_bytes())
            except AuthenticationError:
                continue
            except (OSError, EOFError):
                return  # the listener was closed; a follower that died in between is noticed by its handle
            self._pipes[rank] = pipe
            threading.Thread(target=self._listen, args=(rank, pipe), name=f"rank-{rank}", daemon=True).start()
            self._ready.put(rank)

    def _listen(self, rank: int, pipe: Connection) -> None:
        try:
            while True:
                failure = msgpack.unpackb(pipe.recv_bytes())
                if failure:
                    self.lose(f"rank {rank}: {failure}")
                else:
                    self._ready.put(rank)
        except (OSError, EOFError, TypeError):  # TypeError: closed by `stop` while it was read
            if not self._stopping:
                log.error("%s", self.lose(f"rank {rank} ended"))


class ParallelEngine(StepEngine):
    """Rank 0: a step engine whose verbs the other ranks follow. `stop` when done."""

    def __init__(self, followers: Followers, *arguments: Any, **options: Any) -> None:
        self._followers: Followers | None = None  # until all are built, every rank runs the same code by itself
        super().__init__(*arguments, **options)
        self._followers = followers

    def extend(self, batch: Sequence[Extend]) -> list[Outcome]:
        self.check_batch(batch)  # refused before anybody hears of it
        return self._all("extend", super().extend, batch, wire=[_packed(extend) for extend in batch])

    def close(self, session: int) -> None:
        self._all("close", super().close, session)

    def evict(self, session: int) -> None:
        self._all("evict", super().evict, session)

    def fork(self, source: int, session: int, length: int) -> bool:
        return self._all("fork", super().fork, source, session, length)

    def plain_logits(self, tokens: Sequence[int]) -> Tensor:
        return self._all("plain_logits", super().plain_logits, list(tokens))

    def check_health(self) -> None:
        """Raise RanksLost once a rank has died or fallen out of step."""
        if self._followers is not None:
            self._followers.check()

    def stop(self) -> None:
        """End the other ranks."""
        if self._followers is not None:
            self._followers.stop()

    def _all(self, verb: str, here: Callable[..., Any], *arguments: Any, wire: Any = None) -> Any:
        """Do a verb on every rank. An error, but for ValueError, leaves the ranks out of step for good."""
        assert self._followers is not None
        self._followers.tell(verb, *(arguments if wire is None else [wire]))
        try:
            return here(*arguments)
        except ValueError:
            raise  # refused by the session table, on every rank alike
        except Exception as error:
            raise self._followers.lose(f"rank 0: {error}") from error


class FollowingEngine(StepEngine):
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
    kind = device_kind(recipe.source.device, recipe.source.path)
    followers = Followers(recipe, start, load_s, step_s)
    try:
        join_group(followers.store, 0, recipe.ranks, kind, step_s)
        loaded = load_model(recipe.source, report)
        followers.wait_for_all("load")
        followers.tell("build")
        options = _options(recipe, loaded.model)
        engine = ParallelEngine(followers, loaded.model, recipe.cache_tokens, **options)
        verify_engine(engine, recipe.source.path)
    except BaseException as error:
        followers.stop()
        if isinstance(error, RanksLost | RuntimeError) and not isinstance(error, LoadError):
            raise LoadError(recipe.source.path, f"its ranks failed: {error}", "Look at their logs.") from error
        raise
    return engine


def follow(recipe: Recipe, rendezvous: Rendezvous, rank: int) -> None:
    """Be rank `rank` until the leader is gone. Raises what ended it; the leader hears of it first."""
    pipe = Client((LOOPBACK, rendezvous.verbs_port), authkey=rendezvous.key)
    verbs: SimpleQueue[bytes | None] = SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, verbs), name="leader", daemon=True).start()
    pipe.send_bytes(msgpack.packb(rank))
    try:
        store = dist.TCPStore(
            LOOPBACK, rendezvous.store_port, recipe.ranks, False, timedelta(seconds=rendezvous.load_s)
        )
        kind = device_kind(recipe.source.device, recipe.source.path)
        join_group(store, rank, recipe.ranks, kind, rendezvous.step_s)
        model = load_model(recipe.source).model
        pipe.send_bytes(msgpack.packb(""))  # loaded; what comes now is done together
        if verbs.get() is None:
            return
        engine = FollowingEngine(model, recipe.cache_tokens, **_options(recipe, model))
        while (message := verbs.get()) is not None:
            obey(engine, message)
    except Exception as error:
        pipe.send_bytes(msgpack.packb(f"{type(error).__name__}: {error}"))
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        pipe.close()


def obey(engine: StepEngine, message: bytes) -> None:
    """Do one verb that the leader has sent."""
    verb, *arguments = msgpack.unpackb(message)
    if verb not in FOLLOWED:
        raise EngineError(f"{verb!r} is no verb of a follower")
    if verb == "extend":
        arguments = [[Extend(*values) for values in arguments[0]]]
    try:
        getattr(engine, verb)(*arguments)
    except ValueError:
        pass  # refused on every rank alike


def _options(recipe: Recipe, model: Any) -> Mapping[str, Any]:
    """What every rank builds its engine with; all ranks call this together."""
    digest = model_digest(model)
    use_local_shares(model)
    return {"backend": recipe.backend, "max_held_rows": recipe.max_held_rows, "digest": digest}


def _packed(extend: Extend) -> tuple[Any, ...]:
    session, position, prefix, tokens, rows, age = astuple(extend)
    return session, position, prefix, [int(token) for token in tokens], rows, age


def _receive(pipe: Connection, verbs: SimpleQueue[bytes | None]) -> None:
    """Queue what the leader sends. When it is gone, even a rank that waits in a collective must end."""
    try:
        while True:
            verbs.put(pipe.recv_bytes())
    except (OSError, EOFError, TypeError):
        verbs.put(None)
    time.sleep(_GRACE_S)
    if dist.is_initialized():
        os._exit(1)
