"""A model role as a deployment of Ray Serve, and the actors of its further ranks.

Only these processes import torch, while they load their model.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Awaitable
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.serve.handle import DeploymentHandle
from ray.util import get_current_placement_group, get_node_ip_address
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.api.generation import Role
from actors.config import ModelConfig, ServiceConfig
from actors.directory import HEARTBEAT_S, Endpoint, Loading
from actors.replica.build import Load, load_role, serve_role
from actors.replica.engine_thread import Engine
from actors.replica.process import collect_rarely, return_freed_memory
from actors.serve.application import DIRECTORY_TIMEOUT_S, DRAIN_S, own_secret, show_logs
from actors.serve.autoscaling import CACHE_USED, WAITING
from actors.serve.ray_metrics import keep_exporting
from actors.text.tokenizer import RoleTokenizer

if TYPE_CHECKING:
    from actors.engine.loader import LoadProgress
    from actors.engine.parallel import Recipe, Rendezvous

log = logging.getLogger(__name__)


class ModelShell:
    """One replica of a model role: loads its weights, listens on its node's address and sends heartbeats."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it, so that sockets open on the event loop that serves them
        self, config: ServiceConfig, role: Role, directory: DeploymentHandle, load: Load = load_role
    ) -> None:
        """load: builds the role's engine, in a thread. It reports its progress and may start further ranks."""
        self._heartbeats: asyncio.Task[None] | None = None  # None until the replica serves
        show_logs()
        self._role, self._directory = role, directory
        self._incarnation = secrets.token_hex(8)
        self._stopping = False
        secret = await own_secret()
        self._engine = engine = await self._load(config, load)
        model = config.models.role(role)
        self._replica = serve_role(
            config,
            role,
            engine,
            # not kept: hundreds of megabytes
            await asyncio.to_thread(RoleTokenizer.load, model.path, model.revision),
            incarnation=self._incarnation,
            secret=secret,
            host=get_node_ip_address(),  # listen on the node's address in the cluster only
        )
        self._host, self._port = await self._replica.start()
        collect_rarely()
        return_freed_memory()
        self._heartbeats = asyncio.create_task(self._keep_sending_heartbeats())
        self._exporting = asyncio.create_task(keep_exporting(self._replica.measured))

    async def _load(self, config: ServiceConfig, load: Load) -> Engine:
        """Build the engine in a thread, and report the progress to the directory meanwhile."""
        progress = _LoadingProgress(self._role, self._incarnation)
        reporting = asyncio.create_task(self._keep_reporting(progress))
        try:
            async with asyncio.timeout(config.deadlines.model_load_s):
                start = partial(_FollowerActor, config.models.role(self._role))
                return await asyncio.to_thread(load, config, self._role, progress.report, start)
        except TimeoutError:
            raise TimeoutError(
                f"{self._role}: {config.models.role(self._role).path} did not load within "
                f"deadlines.model_load_s ({config.deadlines.model_load_s:g} s); raise it, or look at {progress.doing!r}"
            ) from None
        finally:
            reporting.cancel()

    async def _keep_reporting(self, progress: _LoadingProgress) -> None:
        while True:
            await _send(self._directory.loading.remote(progress.now()))
            await asyncio.sleep(HEARTBEAT_S)

    async def _keep_sending_heartbeats(self) -> None:
        while True:
            await self._send_heartbeat()
            await asyncio.sleep(HEARTBEAT_S)

    async def _send_heartbeat(self) -> None:
        load = self._replica.load()
        endpoint = Endpoint(
            self._role,
            self._host,
            self._port,
            self._incarnation,
            sessions=load.sessions,
            cache_free=load.cache_free,
            stopping=self._stopping,
        )
        await _send(self._directory.heartbeat.remote(endpoint))

    async def check_health(self) -> None:
        """Serve's health check. Raises if the replica cannot continue or its heartbeats have ended."""
        self._replica.check_health()
        self._engine.check_health()
        assert self._heartbeats is not None
        if self._heartbeats.done():
            raise RuntimeError(f"{self._role}: the heartbeat has ended") from self._heartbeats.exception()

    async def check_cache(self) -> tuple[str, int]:
        """This replica's incarnation, and the result of ModelReplica.check_cache."""
        return self._incarnation, await self._replica.check_cache()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The load that `actors.serve.autoscaling.LoadPolicy` reads. Serve calls this if the role is autoscaled."""
        load = self._replica.load()
        return {CACHE_USED: load.cache_used / load.cache_total, WAITING: float(load.waiting)}

    async def __del__(self) -> None:
        """Serve's shutdown hook: take no new sessions, wait for the others to move or end, leave the directory."""
        if self._heartbeats is None:
            return  # it did not start
        self._stopping = True
        await self._send_heartbeat()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S / 2):
                while self._replica.load().sessions:  # noqa: ASYNC110 - there is no event for the last session
                    await asyncio.sleep(HEARTBEAT_S / 10)
        self._heartbeats.cancel()
        self._exporting.cancel()
        await self._replica.stop()
        await _send(self._directory.leave.remote(self._incarnation))


class _Rank:
    """A further rank of a tensor-parallel model, as an actor. The first rank is the replica itself."""

    def follow(self, recipe: Recipe, rendezvous: Rendezvous, rank: int) -> None:
        """See actors.engine.parallel.follow."""
        from actors.engine.parallel import follow  # loads torch

        show_logs()
        follow(recipe, rendezvous, rank)


class _FollowerActor:
    """A further rank, in its own bundle of the replica's placement group. It ends with the replica."""

    def __init__(self, model: ModelConfig, recipe: Recipe, rendezvous: Rendezvous, rank: int) -> None:
        bundle = PlacementGroupSchedulingStrategy(get_current_placement_group(), placement_group_bundle_index=rank)
        options = {"num_cpus": model.num_cpus, "num_gpus": model.num_gpus, "resources": model.resources}
        self._actor = ray.remote(_Rank).options(scheduling_strategy=bundle, **options).remote()
        self._run = self._actor.follow.remote(recipe, rendezvous, rank)

    def alive(self) -> bool:
        ended, _ = ray.wait([self._run], timeout=0)
        return not ended

    def stop(self) -> None:
        ray.kill(self._actor)


class _LoadingProgress:
    """The progress of a loading model. `report` is called on the loading thread."""

    def __init__(self, role: Role, incarnation: str) -> None:
        self._role, self._incarnation, self._began = role, incarnation, time.monotonic()
        self.doing = "starting"

    def report(self, progress: LoadProgress) -> None:
        size = _size(progress.bytes)
        self.doing = {
            "config": "reading its config.json",
            "weights": f"loading {size} of weights" if progress.bytes else "fetching weights",
            "adapter": "loading its adapter",
            "loaded": f"{size} of weights are loaded",
            "check": f"{size} of weights are loaded, checking the engine against a plain forward",
            "ready": "opening its socket",
        }[progress.stage]

    def now(self) -> Loading:
        return Loading(self._role, self._incarnation, self.doing, time.monotonic() - self._began)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


async def _send(call: Awaitable[Any]) -> None:
    """Await a call to the directory. Never raises: without the directory only its data grows old."""
    try:
        await asyncio.wait_for(_awaited(call), DIRECTORY_TIMEOUT_S)
    except Exception as error:
        log.info("the directory does not answer: %s", type(error).__name__)


async def _awaited(call: Awaitable[Any]) -> Any:
    return await call  # Serve's responses are awaitable without being coroutines or futures
