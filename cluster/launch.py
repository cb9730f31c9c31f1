"""Brings a service up on this machine for as long as a caller needs it, with a local Ray of its own."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import psutil
import ray
from ray import serve

from actors.config import ServiceConfig
from actors.replica.build import Load, load_role
from router.app import bind

LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 80 * 2**20  # of a Ray that runs the service alone: nothing large goes through it
# Ray's processes inherit these from the one that starts them; with ray_config.yaml they come from there.
PROXY_HOOK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "router.proxy:middleware"}  # of every node with a proxy
SETTINGS = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    **PROXY_HOOK,
}


class LaunchError(RuntimeError):
    """The service did not come up on this machine; the message says at which step, and where to look."""


@contextmanager
def running_service(
    config: ServiceConfig,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    *,
    dashboard: bool = False,
    load: Load = load_role,
) -> Iterator[str]:
    """The base URL of a service that answers on the loopback interface; every process of it ends with the context.

    num_cpus, num_gpus: what Ray takes this machine to have; default: what it has, and two CPUs at least.
    dashboard: start Ray's dashboard too, whose server answers Ray's state API.
    load: makes the engine of a role, in the process of its replica.

    Raises ConfigError when the models are missing or do not fit, LaunchError when Ray or Serve do not start.
    """
    application = bind(config, load)  # refuses before anything is started
    cpus = num_cpus or max(2, os.cpu_count() or 2)
    with local_ray(cpus, num_gpus, dashboard=dashboard, object_store_memory=OBJECT_STORE_BYTES):
        port = free_port()
        try:
            serve.start(proxy_location="HeadOnly", http_options={"host": LOOPBACK, "port": port})
            serve.run(application, name=config.name, route_prefix="/")
        except Exception as error:
            raise LaunchError(f"Ray Serve did not start {config.name} on port {port}: {error}\n{_LOGS}") from error
        yield f"http://{LOOPBACK}:{port}"
        serve.delete(config.name)  # replicas take their leave; after an error they are ended with Ray


@contextmanager
def local_ray(
    num_cpus: int | None = None, num_gpus: int | None = None, *, dashboard: bool = False, **options: Any
) -> Iterator[None]:
    """A Ray cluster of this machine alone, and this process as its driver. Raises LaunchError.

    num_cpus, num_gpus: None: as Ray counts them. options: further arguments of `ray.init`.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in SETTINGS.items()})
    defaults = {"dashboard_port": free_port(), "log_to_driver": False, "logging_level": logging.ERROR}
    try:
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                include_dashboard=dashboard,
                **defaults | options,
            )
        except Exception as error:
            raise LaunchError(f"Ray did not start on this machine: {error}\n{_LOGS}") from error
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        yield
    finally:
        ray.shutdown()


def join_ray(**options: Any) -> bool:
    """Connect this process to the Ray cluster at RAY_ADDRESS, by default to one that runs on this machine.

    False if RAY_ADDRESS is "local", or if it is not set and no cluster runs here: the caller needs one of its own.
    options: further arguments of `ray.init`. Raises LaunchError if no cluster answers at RAY_ADDRESS.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address == "local":
        return False
    defaults = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        ray.init(address=address or "auto", **defaults | options)
    except ConnectionError as error:
        if address:
            raise LaunchError(f"no Ray answers at RAY_ADDRESS={address}: {error}") from error
        return False
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    return True


@contextmanager
def claimed_port(host: str, port: int) -> Iterator[None]:
    """Holds an HTTP port for Ray Serve's proxy while the context lasts. Raises LaunchError if it is taken.

    The proxy binds with SO_REUSEPORT, so that the kernel would let two services of one user share a port. A socket
    without this option is refused beside any other listener, with or without it. Once bound it takes the option, so
    that the proxy may listen beside it; it gives up SO_REUSEADDR, so that no other claim is granted meanwhile.
    """
    with ExitStack() as stack:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            claim = stack.enter_context(socket.socket(family, kind, protocol))
            claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier run may linger
            claim.bind(address)
        except OSError as error:
            way_out = "set another http_options.host or http_options.port in the Serve config file"
            if error.errno == errno.EADDRINUSE:
                holder = _listener(port)
                raise LaunchError(f"port {port} of {host} is taken: {holder}; stop it, or {way_out}") from error
            raise LaunchError(f"port {port} of {host} cannot be used ({error.strerror}): {way_out}") from error
        claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        yield


def _listener(port: int) -> str:
    """The process that listens on a TCP port, and its address, as far as this user may see it."""
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                address = f"{connection.laddr.ip}:{port}"
                if connection.pid is None:
                    return f"a process of another user listens on {address}"
                return f"{psutil.Process(connection.pid).name()}, process {connection.pid}, listens on {address}"
    return "a process that cannot be seen from here listens on it"


def free_port() -> int:
    """A TCP port of the loopback interface that no process listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
    return port


_LOGS = "The newest session folder of Ray holds its logs; `ray stop` ends what an earlier run may have left behind"
