"""The service that a job asks: the one that runs in its cluster, or one that it brings up and takes down again.

Ray is looked for where RAY_ADDRESS says, else on this machine; RAY_ADDRESS=local, or no Ray at all, means one of the
job's own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import serve

from actors.config import ServiceConfig
from cluster.launch import LaunchError, running_service
from cluster.serve_file import read_service_config
from router.app import ServedCoordinators, bind
from router.backend import Backend
from router.failover import FailoverBackend

ANSWER_S = 60.0  # a coordinator that is there says how it is configured within this
POLL_S = 0.5
Log = Callable[[str], None]
Adapted = Callable[[ServiceConfig], ServiceConfig]


@dataclass(frozen=True, slots=True)
class Connection:
    """A service that can be asked, and what it was built from."""

    backend: Backend
    service: ServiceConfig


@contextmanager
def connected(file: Path, log: Log, adapted: Adapted | None = None) -> Iterator[Connection]:
    """A connection to the service that `file` describes.

    Of a service that runs already the name counts, and what it says of itself. adapted: gives the guider the adapter
    that is wanted; then a service that runs with another is let alone, and one of the job's own brought up beside it.
    Raises ConfigError for a file or models that are not sound, LaunchError where nothing comes up.
    """
    wanted = read_service_config(file)
    if adapted is not None:
        wanted = adapted(wanted)
    if not joined():
        log("no Ray runs here: starting one, and the service in it ...")
        with running_service(wanted):
            yield _connection(wanted.name)
        return
    try:
        with _application(wanted, log, same_adapter=adapted is not None) as name:
            yield _connection(name)
    finally:
        ray.shutdown()


async def ready(backend: Backend, deadline_s: float, log: Log) -> None:
    """Return once every role is there; says what is awaited whenever that changes. Raises LaunchError."""
    until, logged = time.monotonic() + deadline_s, ""
    while (status := await backend.status()).missing:
        awaited = "; ".join(status.awaited) or ", ".join(status.missing)
        if time.monotonic() > until:
            raise LaunchError(f"the service is not complete after {deadline_s:g} s: {awaited}")
        if awaited != logged:
            log(f"waiting for {awaited}")
            logged = awaited
        await asyncio.sleep(POLL_S)


def joined() -> bool:
    """Join the Ray that there is; False where this job needs one of its own."""
    address = os.environ.get("RAY_ADDRESS")
    if address == "local":
        return False
    try:
        ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        if address:
            raise LaunchError(f"no Ray answers at RAY_ADDRESS={address}: {error}") from error
        return False
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    return True


@contextmanager
def _application(wanted: ServiceConfig, log: Log, *, same_adapter: bool) -> Iterator[str]:
    """The name of the application that is asked. One of the job's own has no HTTP address, and ends with it."""
    running = serve.status().applications
    own = f"{wanted.name}-jobs"

    def matches(name: str) -> bool:
        if name not in running:
            return False
        return not same_adapter or _connection(name).service.models.guider.adapter == wanted.models.guider.adapter

    if matches(wanted.name):
        log(f"asking the service {wanted.name}, which runs in this cluster")
        yield wanted.name
        return
    if not matches(own):
        log(f"no such service {wanted.name} runs in this cluster: bringing it up as {own} ...")
        serve.start(proxy_location="Disabled")
        try:
            serve.run(bind(wanted), name=own, route_prefix=None)
        except RuntimeError as error:  # what Serve raises when a deployment fails
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
