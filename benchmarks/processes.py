"""Objects in processes of their own, plain ones or Ray actors, and a model replica as such an object.

Small models get half of the target's threads: three models and a coordinator that share few cores would otherwise
compete for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import multiprocessing
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from multiprocessing.connection import Connection
from typing import Any, Literal, Protocol, TypeAlias

import uvloop

from actors.api.generation import Role
from actors.config import ServiceConfig
from actors.directory import Endpoint
from actors.replica.build import load_role, serve_role
from actors.replica.engine_thread import Engine
from actors.replica.process import SPIN, collect_rarely, on_temporary_thread
from actors.replica.stats import ReplicaStats
from actors.text.tokenizer import RoleTokenizer
from benchmarks.peak_memory import PeakMemory
from benchmarks.shapes import Shape
from benchmarks.timed_engine import TimedEngine, TimedShape

LauncherName: TypeAlias = Literal["processes", "ray"]
STOP_S = 10.0


class Worker(Protocol):
    """An object in another process; one call at a time."""

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method; returns its result, and raises its exception here."""


Launch: TypeAlias = Callable[..., Awaitable[Worker]]  # of a class and its arguments


class ModelWorker(PeakMemory):
    """One replica of a role, with an engine of its own."""

    def __init__(
        self,
        shape: Shape,
        role: Role,
        agreement: float,
        config: ServiceConfig,
        secret: bytes,
        threads: int,
        host: str = "127.0.0.1",
    ) -> None:
        self._role, self._incarnation = role, secrets.token_hex(8)
        engine = build_engine(shape, role, agreement, config, threads)
        tokenizer = RoleTokenizer.load(config.models.role(role).path)
        self._replica = serve_role(
            config, role, engine, tokenizer, incarnation=self._incarnation, secret=secret, host=host
        )

    async def start(self) -> Endpoint:
        """Listen on the host's address."""
        host, port = await self._replica.start()
        collect_rarely()
        return Endpoint(self._role, host, port, self._incarnation)

    async def stats(self) -> ReplicaStats:
        """Totals since the start."""
        return self._replica.stats()

    async def stop(self) -> None:
        """Close every connection."""
        await self._replica.stop()


def build_engine(shape: Shape, role: Role, agreement: float, config: ServiceConfig, threads: int) -> Engine:
    """The engine of a role: a simulated one, the trio's, or one with dummy weights of the shape."""
    cache_tokens = config.models.role(role).cache_tokens
    assert cache_tokens != "auto", "benchmarks.shapes states it"
    if isinstance(shape, TimedShape):
        return TimedEngine(shape, role, agreement, cache_tokens)
    import torch

    torch.set_num_threads(threads if role == "target" else max(1, threads // 2))
    if shape.folders is not None:
        return load_role(config, role)
    from actors.engine.native_runner import native_engine
    from benchmarks.agreement import agreeing_model

    return on_temporary_thread(lambda: native_engine(agreeing_model(shape, role, agreement), cache_tokens))


@asynccontextmanager
async def launcher(name: LauncherName, threads: int) -> AsyncIterator[Launch]:
    """A function that starts a worker from a class and its arguments; all of them end with the context."""
    environment = thread_environment(threads)
    async with _plain(environment) if name == "processes" else _ray(environment) as launch:
        yield launch


def thread_environment(threads: int) -> dict[str, str]:
    """Environment variables by which the libraries below torch use a number of threads."""
    spin, rounds = SPIN
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        spin: os.environ.get(spin, rounds),
        "TOKENIZERS_PARALLELISM": "false",
    }


@asynccontextmanager
async def _plain(environment: dict[str, str]) -> AsyncIterator[Launch]:
    async with AsyncExitStack() as stack:

        async def launch(factory: Callable[..., Any], *arguments: Any) -> Worker:
            worker = ProcessWorker(factory, arguments, environment)
            stack.push_async_callback(worker.close)
            await worker.answer()  # that it is made
            return worker

        yield launch


@asynccontextmanager
async def _ray(environment: dict[str, str]) -> AsyncIterator[Launch]:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        "local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 << 20,
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": environment},
    )

    async def launch(factory: Callable[..., Any], *arguments: Any) -> Worker:
        return RayWorker(ray.remote(num_cpus=0)(factory).remote(*arguments))

    try:
        yield launch
    finally:
        ray.shutdown()


class RayWorker:
    """A Ray actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def call(self, method: str, *arguments: Any) -> Any:
        return await getattr(self._actor, method).remote(*arguments)


class ProcessWorker:
    """A plain process. `answer` first waits until its object is made."""

    def __init__(self, factory: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, factory, arguments), daemon=True)
        with _environment(environment):
            self._process.start()
        theirs.close()

    async def call(self, method: str, *arguments: Any) -> Any:
        self._pipe.send((method, arguments))
        return await self.answer()

    async def answer(self) -> Any:
        """The process's next message. Raises EOFError when it has ended."""
        value, error = await asyncio.to_thread(self._pipe.recv)
        if error is not None:
            raise error
        return value

    async def close(self) -> None:
        """End the process."""
        self._pipe.close()
        await asyncio.to_thread(self._process.join, STOP_S)
        if self._process.is_alive():
            self._process.kill()


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Any:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(pipe: Connection, factory: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_answer(pipe, factory, arguments))


async def _answer(pipe: Connection, factory: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Make the object, then run the calls that arrive until the pipe is closed."""
    try:
        thing = factory(*arguments)
        pipe.send((None, None))
        while True:
            method, values = await asyncio.to_thread(pipe.recv)
            try:
                result = getattr(thing, method)(*values)
                pipe.send((await result if inspect.isawaitable(result) else result, None))
            except Exception as error:
                pipe.send((None, error))
    except EOFError:
        return
    except Exception as error:
        pipe.send((None, error))
