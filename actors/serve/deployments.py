"""The Ray Serve shells: thin classes that place and start what the rest of `actors` defines.

Torch is imported by the model roles' processes only, while they load.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import ray
from ray import serve
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.handle import DeploymentHandle
from ray.util import get_current_placement_group, get_node_ip_address
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.api.generation import Generate, Role, Told
from actors.config import ModelConfig, ServiceConfig
from actors.coordinator.coordinator import Coordinator
from actors.coordinator.stats import CoordinatorLoad
from actors.directory import HEARTBEAT_S, Directory, Endpoint, Loading, Snapshot
from actors.preflight import load_tokenizers
from actors.replica.build import load_role, serve_role
from actors.replica.engine_thread import Engine
from actors.replica.process import collect_rarely
from actors.serve.autoscaling import CACHE_USED, WAITING
from actors.serve.ray_metrics import keep_exporting
from actors.text.tokenizer import RoleTokenizer
from actors.wire.tls import client_context

if TYPE_CHECKING:
    from actors.engine.loader import LoadProgress
    from actors.engine.parallel import Recipe, Rendezvous, StartFollower

log = logging.getLogger(__name__)

SECRET_BYTES = 32
DRAIN_S = 20.0  # a replica that is told to go may take so long to let its sessions move or end
TELL_S = 2.0  # one message to the directory; a lost one is repeated by the next heartbeat
_NAMESPACE = "thinklogit"

Load: TypeAlias = "Callable[[ServiceConfig, Role, Callable[[LoadProgress], None], StartFollower], Engine]"


def application_secret(application: str) -> bytes:
    """The secret by which coordinators and models of one application know each other, drawn by whoever asks first.

    It lives in Ray's own key-value store, so that redeploys and a lost directory keep it. Blocks for two calls to the
    cluster's head; needs a connected Ray process.
    """
    key = f"wire-secret:{application}"
    _internal_kv_put(key, secrets.token_bytes(SECRET_BYTES), overwrite=False, namespace=_NAMESPACE)
    kept: bytes = _internal_kv_get(key, namespace=_NAMESPACE)
    return kept


def show_logs() -> None:
    """Send the log lines of this project's packages where Serve sends its own: the replica's file and the console."""
    serve_log = logging.getLogger("ray.serve")
    for package in ("actors", "router"):
        log_of_package = logging.getLogger(package)
        log_of_package.setLevel(serve_log.level or logging.INFO)
        log_of_package.handlers = serve_log.handlers
        log_of_package.propagate = False


async def _own_secret() -> bytes:
    return await asyncio.to_thread(application_secret, serve.get_replica_context().app_name)


async def _told(call: Awaitable[Any]) -> bool:
    """Whether the directory heard it in time. Never raises: a directory that is away costs nothing but freshness."""
    try:
        await asyncio.wait_for(_awaited(call), TELL_S)
    except Exception as error:
        log.info("the directory does not answer: %s", type(error).__name__)
        return False
    return True


async def _awaited(call: Awaitable[Any]) -> Any:
    return await call  # Serve's responses are awaitable without being coroutines or futures


async def application_details(application: str) -> dict[str, Any] | None:
    """What Serve's controller knows of an application, in Serve's public schema ApplicationDetails; None if nothing."""
    controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    details = await controller.get_serve_instance_details.remote()
    found: dict[str, Any] | None = details["applications"].get(application)
    return found


async def _stopping_replicas(application: str) -> frozenset[str]:
    """Ids of the application's replicas that Serve is stopping.

    Serve tells a replica nothing of it while a stream is open there, and kills it in the end; its controller knows.
    """
    details = await application_details(application) or {"deployments": {}}
    replicas = [replica for deployment in details["deployments"].values() for replica in deployment["replicas"]]
    return frozenset(replica["replica_id"] for replica in replicas if replica["state"] == "STOPPING")


class DirectoryShell:
    """The directory as a deployment: one replica, whose loss costs a few seconds of freshness."""

    async def __init__(self) -> None:  # type: ignore[misc]  # awaited by Serve
        self._directory = Directory()
        self._leaving: frozenset[str] = frozenset()
        self._asking = asyncio.create_task(self._keep_asking(serve.get_replica_context().app_name))

    async def _keep_asking(self, application: str) -> None:
        while True:
            try:
                async with asyncio.timeout(TELL_S):
                    self._leaving = await _stopping_replicas(application)
            except Exception as error:  # the controller may be away for any reason
                log.info("the Serve controller does not answer: %s", type(error).__name__)
            await asyncio.sleep(HEARTBEAT_S)

    async def heartbeat(self, endpoint: Endpoint) -> None:
        """See Directory.heartbeat."""
        self._directory.heartbeat(endpoint)

    async def loading(self, progress: Loading) -> None:
        """See Directory.loading."""
        self._directory.loading(progress)

    async def leave(self, incarnation: str) -> None:
        """See Directory.leave."""
        self._directory.leave(incarnation)

    async def snapshot(self) -> Snapshot:
        """See Directory.snapshot; with the replicas that Serve is stopping."""
        return Snapshot(self._directory.snapshot(), self._leaving)

    async def awaited(self) -> dict[Role, str]:
        """See Directory.awaited."""
        return self._directory.awaited()


class ModelShell:
    """One replica of a model role: loads its weights, listens on its node's address, tells the directory."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it, so that sockets open on the loop that serves them
        self, config: ServiceConfig, role: Role, directory: DeploymentHandle, load: Load = load_role
    ) -> None:
        """load: makes the role's engine, in a thread; it reports how far it is, and may start other ranks."""
        show_logs()
        self._role, self._directory = role, directory
        self._incarnation = secrets.token_hex(8)
        self._stopping = False
        secret = await _own_secret()
        self._engine = engine = await self._load(config, load)
        model = config.models.role(role)
        tokenizer = await asyncio.to_thread(RoleTokenizer.load, model.path, model.revision)
        self._replica = serve_role(
            config,
            role,
            engine,
            tokenizer,
            incarnation=self._incarnation,
            secret=secret,
            host=get_node_ip_address(),  # the node's address in the cluster and nowhere else
        )
        self._host, self._port = await self._replica.start()
        collect_rarely()
        self._beat = asyncio.create_task(self._keep_telling())
        self._exporting = asyncio.create_task(keep_exporting(self._replica.measured))

    async def _load(self, config: ServiceConfig, load: Load) -> Engine:
        """The engine, built in a thread so that the directory hears of the progress meanwhile."""
        starting = _Starting(self._role, self._incarnation)
        telling = asyncio.create_task(self._tell_progress(starting))
        try:
            async with asyncio.timeout(config.deadlines.model_load_s):
                start = partial(_FollowerActor, config.models.role(self._role))
                return await asyncio.to_thread(load, config, self._role, starting.report, start)
        except TimeoutError:
            raise TimeoutError(
                f"{self._role}: {config.models.role(self._role).path} did not load within "
                f"deadlines.model_load_s ({config.deadlines.model_load_s:g} s); raise it, or look at {starting.doing!r}"
            ) from None
        finally:
            telling.cancel()

    async def _tell_progress(self, starting: _Starting) -> None:
        while True:
            await _told(self._directory.loading.remote(starting.now()))
            await asyncio.sleep(HEARTBEAT_S)

    async def _keep_telling(self) -> None:
        while True:
            await self._tell()
            await asyncio.sleep(HEARTBEAT_S)

    async def _tell(self) -> None:
        load = self._replica.load()
        endpoint = Endpoint(
            self._role,
            self._host,
            self._port,
            self._incarnation,
            sessions=load.sessions,
            cache_free=load.cache_total - load.cache_used,
            stopping=self._stopping,
        )
        await _told(self._directory.heartbeat.remote(endpoint))

    async def check_health(self) -> None:
        """Serve's health check: raises when the replica cannot go on, or no longer says that it is there."""
        self._replica.check_health()
        self._engine.check_health()
        if self._beat.done():
            raise RuntimeError(f"{self._role}: the heartbeat has ended") from self._beat.exception()

    async def check_cache(self) -> tuple[str, int]:
        """This replica's incarnation, and what ModelReplica.check_cache says of it."""
        return self._incarnation, await self._replica.check_cache()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `actors.serve.autoscaling.LoadPolicy` decides by; Serve asks only where replicas may vary."""
        load = self._replica.load()
        return {CACHE_USED: load.cache_used / load.cache_total, WAITING: float(load.waiting)}

    async def __del__(self) -> None:
        """Serve's shutdown hook: no new sessions, wait for the old ones to move or end, leave."""
        if not hasattr(self, "_beat"):
            return  # it never started
        self._stopping = True
        await self._tell()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S / 2):
                while self._replica.load().sessions:  # noqa: ASYNC110 - the replica announces no last session
                    await asyncio.sleep(HEARTBEAT_S / 10)
        self._beat.cancel()
        self._exporting.cancel()
        await self._replica.stop()
        await _told(self._directory.leave.remote(self._incarnation))


class _Rank:
    """Any rank but the first of a tensor-parallel model, as an actor."""

    def follow(self, recipe: Recipe, rendezvous: Rendezvous, rank: int) -> None:
        """See actors.engine.parallel.follow."""
        from actors.engine.parallel import follow  # loads torch

        show_logs()
        follow(recipe, rendezvous, rank)


class _FollowerActor:
    """The handle of a rank that runs in its own bundle of the replica's placement group, and ends with the replica."""

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


class _Starting:
    """What a loading model does now; `report` is called in the loading thread."""

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


class CoordinatorShell:
    """One coordinator as a deployment. A consumer that goes away cancels its generation."""

    async def __init__(  # type: ignore[misc]  # awaited by Serve
        self, config: ServiceConfig, directory: DeploymentHandle, models: Sequence[DeploymentHandle]
    ) -> None:
        """models: bound here so that they belong to the application; their sockets are found through the directory."""
        show_logs()
        this = serve.get_replica_context().replica_tag

        async def locate() -> Sequence[Endpoint]:
            async with asyncio.timeout(TELL_S):
                snapshot: Snapshot = await directory.snapshot.remote()
            if this in snapshot.leaving:
                self._coordinator.hand_over()
            return snapshot.endpoints

        self._config = config
        tokenizers = await asyncio.to_thread(load_tokenizers, config)
        self._coordinator = Coordinator(config, tokenizers, await _own_secret(), locate, tls=client_context())
        await self._coordinator.start()
        self._exporting = asyncio.create_task(keep_exporting(self._coordinator.measured))
        collect_rarely()

    async def generate(self, request: Generate) -> AsyncIterator[Told]:
        """See Coordinator.generate."""
        async with contextlib.aclosing(self._coordinator.generate(request)) as events:
            async for event in events:
                yield event

    async def config(self) -> ServiceConfig:
        """What the service was built from."""
        return self._config

    async def missing_roles(self) -> tuple[Role, ...]:
        """See Coordinator.missing_roles."""
        return self._coordinator.missing_roles()

    async def load(self) -> CoordinatorLoad:
        """See Coordinator.load."""
        return self._coordinator.load()

    async def __del__(self) -> None:
        if hasattr(self, "_exporting"):
            self._exporting.cancel()
            await self._coordinator.stop()
