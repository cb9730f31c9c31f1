"""Binds the Ray Serve application; `ray_config.yaml` names `router.app:build`."""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from actors.api.generation import CoordinatorEvent, Generate, Role
from actors.api.message import UnknownField
from actors.config import (
    CoordinatorConfig,
    ModelConfig,
    ModelReplicas,
    Replicas,
    RouterConfig,
    ServiceConfig,
    load_config,
)
from actors.metrics import Recorder
from actors.preflight import load_tokenizers, require_sound, runtime_env, with_engines
from actors.replica.build import Load, load_role
from actors.replica.process import collect_rarely, return_freed_memory
from actors.serve.application import DRAIN_S, application_details, show_logs
from actors.serve.coordinator import CoordinatorShell
from actors.serve.directory import DirectoryShell
from actors.serve.model import ModelShell
from actors.serve.ray_metrics import keep_exporting
from router.api import create_app
from router.backend import Overloaded, Status, Unavailable
from router.failover import FailoverBackend, HandedOver
from router.grammars import GrammarChecks

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger(__name__)

MODEL_NAMES: dict[Role, str] = {"target": "Target", "guider": "Guider", "guider_base": "GuiderBase"}
MAX_ONGOING = 10_000  # above the coordinators' capacity, so that they reject excess requests, not Serve's queue
STATUS_S = 5.0  # timeout of a status query
DIRECTORY_CPUS = 0.05
_SETTINGS: dict[str, Any] = {
    "max_ongoing_requests": MAX_ONGOING,
    "health_check_period_s": 1.0,
    "health_check_timeout_s": 30.0,
    "graceful_shutdown_wait_loop_s": 0.1,
    "graceful_shutdown_timeout_s": DRAIN_S,
}


class ServedCoordinators:
    """The coordinators and the directory behind Serve's handles; `FailoverBackend` makes them the API's backend."""

    def __init__(self, application: str, coordinator: DeploymentHandle, directory: DeploymentHandle) -> None:
        # Over gRPC: a streamed event costs 0.1 ms, by reference 0.5 ms. Set here, because Serve's own setting takes
        # effect only in processes that imported Serve with it.
        self._coordinator = coordinator.options(stream=True, _by_reference=False)
        self._application, self._directory = application, directory

    async def generate(self, request: Generate) -> AsyncIterator[CoordinatorEvent]:
        """See router.backend.Coordinators.generate."""
        response = self._coordinator.generate.remote(request)
        try:
            async for event in response:
                yield event
        except BackPressureError as error:
            raise Overloaded("too many requests are waiting; try again later") from error
        except RayTaskError as error:
            if isinstance(error.cause, UnknownField):  # another coordinator may be newer
                raise Unavailable(f"its coordinator runs an older version: {error.cause}") from error
            raise  # an exception inside the coordinator, not its loss
        except DeploymentUnavailableError as error:
            raise HandedOver("no coordinator runs") from error
        except RayError as error:
            raise Unavailable("its coordinator was lost") from error
        finally:
            response.cancel()  # no effect after the stream's end

    async def status(self) -> Status:
        """See router.backend.Coordinators.status."""
        try:
            async with asyncio.timeout(STATUS_S):
                awaited: dict[Role, str] = await self._directory.awaited.remote()
        except TimeoutError:
            return Status(missing=tuple(MODEL_NAMES), awaited=("the directory does not answer",))
        return Status(tuple(awaited), tuple(f"{role}: {words}" for role, words in awaited.items()))

    async def ending(self) -> bool:
        """See router.backend.Coordinators.ending."""
        try:
            async with asyncio.timeout(STATUS_S):
                details = await application_details(self._application)
        except Exception as error:  # any failure of the controller may be temporary
            log.info("the Serve controller does not answer: %s", type(error).__name__)
            return False
        return details is None or details["status"] == "DELETING"


class RouterShell:
    """The router's deployment. Serve calls `__serve_build_asgi_app__` once the tokenizers are loaded."""

    async def __init__(  # type: ignore[misc]  # awaited by Serve
        self, config: ServiceConfig, coordinator: DeploymentHandle, directory: DeploymentHandle
    ) -> None:
        show_logs()
        self._config = config
        self._tokenizers = await asyncio.to_thread(load_tokenizers, config)
        application = serve.get_replica_context().app_name
        self._recorder = Recorder()
        coordinators = ServedCoordinators(application, coordinator, directory)
        self._backend = FailoverBackend(coordinators, config.deadlines, self._recorder)
        self._exporting = asyncio.create_task(keep_exporting(lambda: self._recorder))
        self._grammars = GrammarChecks(self._tokenizers)
        await self._grammars.start("target")  # seconds with a large vocabulary
        collect_rarely()
        return_freed_memory()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._config, self._tokenizers, self._backend, self._recorder, self._grammars)


def build(args: dict[str, Any]) -> serve.Application:
    """The application described by the `args` of `ray_config.yaml`.

    Raises ConfigError that names each invalid key and each model that is missing or incompatible.
    """
    return bind(load_config(args))


def bind(config: ServiceConfig, load: Load = load_role) -> serve.Application:
    """The application of a configuration. Raises ConfigError if its models are missing or incompatible.

    load: creates a role's engine, in its replica's process.
    """
    require_sound(config)
    config = with_engines(config)
    directory = serve.deployment(
        DirectoryShell,
        name="Directory",
        ray_actor_options={"num_cpus": DIRECTORY_CPUS},
        logging_config={"enable_access_log": False},  # heartbeats
        **_SETTINGS,
    ).bind()
    models = [_model(config, role).bind(config, role, directory, load) for role in MODEL_NAMES]
    coordinator = serve.deployment(
        CoordinatorShell,
        name="Coordinator",
        ray_actor_options=_placement(config.coordinator),
        **_replicas(config.coordinator.replicas, target_ongoing_requests=config.coordinator.target_ongoing),
        **_SETTINGS,
    ).bind(config, directory, models)
    router = serve.deployment(serve.ingress()(RouterShell), name="Router", **router_options(config))
    return router.bind(config, coordinator, directory)


def router_options(config: ServiceConfig) -> dict[str, Any]:
    """Serve's options for the deployment of the router: resources, replicas, limits."""
    placement = {"ray_actor_options": _placement(config.router)}
    replicas = _replicas(config.router.replicas, target_ongoing_requests=config.router.target_ongoing)
    shutdown = {"graceful_shutdown_timeout_s": config.deadlines.request_s}  # its streams cannot move to another router
    return placement | replicas | _SETTINGS | shutdown


def _model(config: ServiceConfig, role: Role) -> serve.Deployment:
    model = config.models.role(role)
    return serve.deployment(
        ModelShell,
        name=MODEL_NAMES[role],
        **_ranks(model, runtime_env(model)),
        **_replicas(model.replicas, policy=_policy(model.replicas)),
        **_SETTINGS,
    )


def _ranks(model: ModelConfig, environment: Mapping[str, Any]) -> dict[str, Any]:
    """Ray options that place a model's ranks: one rank like any replica, several in a placement group on one node.

    The replica is the first rank and uses the first bundle; it starts the other ranks in the other bundles.
    """
    options = _placement(model) | ({"runtime_env": dict(environment)} if environment else {})
    if model.tensor_parallel == 1:
        return {"ray_actor_options": options}
    labels = options.pop("label_selector", None)
    amounts = {"CPU": model.num_cpus, "GPU": model.num_gpus, **model.resources}
    bundle = {name: amount for name, amount in amounts.items() if amount}
    group: dict[str, Any] = {
        "ray_actor_options": options,
        "placement_group_bundles": [dict(bundle) for _ in range(model.tensor_parallel)],
        "placement_group_strategy": "STRICT_PACK",
    }
    return group | ({"placement_group_bundle_label_selector": [labels]} if labels else {})


def _placement(section: ModelConfig | CoordinatorConfig | RouterConfig) -> dict[str, Any]:
    """The resources that a replica requires, as Ray actor options."""
    options = section.model_dump(include={"num_cpus", "num_gpus", "resources", "label_selector"})
    return {name: value for name, value in options.items() if value != {}}


def _replicas(replicas: Replicas, **scaling: Any) -> dict[str, Any]:
    """A fixed number of replicas, or Serve's autoscaling between two. scaling: the target of autoscaling."""
    if replicas.min == replicas.max:
        return {"num_replicas": replicas.min}
    with warnings.catch_warnings():
        # Serve deprecates metrics_interval_s in favour of environment variables that it does not read yet.
        warnings.simplefilter("ignore", DeprecationWarning)
        config = AutoscalingConfig(
            min_replicas=replicas.min,
            max_replicas=replicas.max,
            upscale_delay_s=replicas.upscale_delay_s,
            downscale_delay_s=replicas.downscale_delay_s,
            look_back_period_s=replicas.look_back_s,
            metrics_interval_s=replicas.look_back_s / 3,
            **scaling,
        )
    return {"autoscaling_config": config}


def _policy(replicas: ModelReplicas) -> dict[str, Any]:
    """The autoscaling policy of a model role. Serve pickles its class by value where the application is built."""
    targets = replicas.model_dump(include={"target_cache", "target_waiting"})
    return {"policy_function": "actors.serve.autoscaling:LoadPolicy", "policy_kwargs": targets}
