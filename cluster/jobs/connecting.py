"""Connects a job to a service: the one that runs in its cluster, or one that the job starts and stops itself.

The job joins the Ray at RAY_ADDRESS, or else the Ray on this machine. With RAY_ADDRESS=local, or if no Ray runs, it
starts its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import serve

from actors.config import ServiceConfig
from cluster.launch import LaunchError, join_ray, running_service
from cluster.serve_file import read_service_config
from router.app import ServedCoordinators, bind
from router.backend import Backend
from router.failover import FailoverBackend

ANSWER_S = 60.0  # limit for a coordinator to return its configuration
POLL_S = 0.5
Log = Callable[[str], None]
Adapted = Callable[[ServiceConfig], ServiceConfig]


@dataclass(frozen=True, slots=True)
class Connection:
    """A running service and its configuration."""

    backend: Backend
    service: ServiceConfig


@contextmanager
def connected(file: Path, log: Log, adapted: Adapted | None = None) -> Iterator[Connection]:
    """A connection to the service that `file` describes.

    A service that already runs under the file's name is used with its own configuration. adapted: sets the guider's
    adapter in a configuration; if it is given, a running service with another adapter is not used, and the job starts
    its own beside it. Raises ConfigError for an invalid file or invalid models, LaunchError if no service starts.
    """
    wanted = read_service_config(file)
    if adapted is not None:
        wanted = adapted(wanted)
    if not join_ray():
        log("no Ray runs here: starting Ray and the service ...")
        with running_service(wanted):
            yield _connection(wanted.name)
        return
    try:
        with _application(wanted, log, same_adapter=adapted is not None) as name:
            yield _connection(name)
    finally:
        ray.shutdown()


async def ready(backend: Backend, deadline_s: float, log: Log) -> None:
    """Wait until every role has a replica, and log missing ones whenever they change. Raises LaunchError."""
    until, logged = time.monotonic() + deadline_s, ""
    while (status := await backend.status()).missing:
        awaited = "; ".join(status.awaited) or ", ".join(status.missing)
        if time.monotonic() > until:
            raise LaunchError(f"the service is not complete after {deadline_s:g} s: {awaited}")
        if awaited != logged:
            log(f"waiting for {awaited}")
            logged = awaited
        await asyncio.sleep(POLL_S)


@contextmanager
def _application(wanted: ServiceConfig, log: Log, *, same_adapter: bool) -> Iterator[str]:
    """The name of the Serve application to use. An application of the job's own has no HTTP port and ends with it."""
    running = serve.status().applications
    own = f"{wanted.name}-jobs"

    def matches(name: str) -> bool:
        if name not in running:
            return False
        return not same_adapter or _connection(name).service.models.guider.adapter == wanted.models.guider.adapter

    if matches(wanted.name):
        log(f"using the service {wanted.name} that runs in this cluster")
        yield wanted.name
        return
    if not matches(own):
        log(f"no matching service {wanted.name} runs in this cluster: starting {own} ...")
        serve.start(proxy_location="Disabled")
        try:
            serve.run(bind(wanted), name=own, route_prefix=None)
        except RuntimeError as error:  # Serve raises it if a deployment fails
            serve.delete(own)
            raise LaunchError(f"Ray Serve did not start {own}: {error}") from error
    try:
        yield own
    finally:
        serve.delete(own)


def _connection(application: str) -> Connection:
    coordinator = serve.get_deployment_handle("Coordinator", application)
    directory = serve.get_deployment_handle("Directory", application)
    try:
        service: ServiceConfig = coordinator.config.remote().result(timeout_s=ANSWER_S)
    except TimeoutError as error:
        raise LaunchError(f"the coordinator of {application} does not answer within {ANSWER_S:g} s") from error
    backend = ServedCoordinators(application, coordinator, directory)
    return Connection(FailoverBackend(backend, service.deadlines), service)
