"""The ranks of a model: their process group, and the leader's side, which starts, directs and watches the others."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import msgpack
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from actors.engine.errors import EngineError, LoadError
from actors.engine.loader import ModelSource
from actors.engine.memory import MAX_ROWS, AutoCache

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"  # ranks share a node, and nothing of theirs listens elsewhere
_TURN_S = 0.1  # how often a wait looks whether those that it waits for still live


class RanksLost(EngineError):
    """A rank died or fell out of step: the engine cannot continue, and its process must be replaced."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """The data from which every rank builds its share of an engine on vLLM."""

    source: ModelSource
    cache_tokens: int | AutoCache
    max_held_rows: int = MAX_ROWS  # not by memory: admission hangs on it and must be the same at every rank

    @property
    def ranks(self) -> int:
        return self.source.tensor_parallel


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """The address of the leader for a follower: loopback ports of the node that they share."""

    operations_port: int
    store_port: int
    key: bytes  # authenticates the two ends of an operations connection
    load_s: float  # the leader waits so long for its followers to load
    step_s: float  # a collective that waits longer ends the ranks


class Follower(Protocol):
    """A process in which `follow` runs."""

    def alive(self) -> bool: ...
    def stop(self) -> None:
        """End it, if it has not ended by itself."""


StartFollower = Callable[[Recipe, Rendezvous, int], Follower]


class Followers:
    """The leader's connections to all other ranks: sends operations, receives failures."""

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
        self.store = TCPStore(
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
        """Wait until every follower has reported that it is ready; LoadError if one is lost or takes too long."""
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

    def broadcast(self, operation: str, *arguments: Any) -> None:
        """Send an operation to every follower. Raises RanksLost."""
        self.check()
        message = msgpack.packb([operation, *arguments])
        for rank, pipe in self._pipes.items():
            try:
                pipe.send_bytes(message)
            except OSError as error:
                raise self.mark_lost(f"rank {rank} is gone: {error}") from error

    def mark_lost(self, why: str) -> RanksLost:
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
                    self.mark_lost(f"rank {rank}: {failure}")
                else:
                    self._ready.put(rank)
        except (OSError, EOFError, TypeError):  # TypeError: closed by `stop` while it was read
            if not self._stopping:
                log.error("%s", self.mark_lost(f"rank {rank} ended"))


def join_group(store: Store, rank: int, ranks: int, device: str, timeout_s: float) -> None:
    """Join the process group of the ranks: nccl on GPUs, gloo on the CPU, both over loopback.

    A collective that waits longer than `timeout_s` raises (gloo), or ends the process (nccl's watchdog).
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    own = None
    if device == "cuda":
        # Ray shows each rank its own GPU; plain processes see all of them.
        index = rank if torch.cuda.device_count() >= ranks else 0
        os.environ["LOCAL_RANK"] = str(index)  # where vLLM puts the weights
        torch.cuda.set_device(index)
        own = torch.device("cuda", index)
    backend = "nccl" if device == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout, device_id=own)
