"""Brings a service up on this machine for as long as a caller needs it, with a local Ray of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray import serve

from actors.config import ServiceConfig
from router.app import bind

# Ray reads these when it is first imported or started; a service started from ray_config.yaml has them from there.
SETTINGS = {"RAY_SERVE_USE_GRPC_BY_DEFAULT": "1", "RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false"}


@contextmanager
def running_service(config: ServiceConfig, num_cpus: int | None = None) -> Iterator[str]:
    """The base URL of a service that answers on the loopback interface; everything is stopped at the end.

    Raises ConfigError when the models are missing or do not fit.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in SETTINGS.items()})
    port = free_port()
    ray.init(
        address="local",
        num_cpus=num_cpus or max(2, os.cpu_count() or 2),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": SETTINGS},
    )
    try:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(http_options={"host": "127.0.0.1", "port": port, "location": "HeadOnly"})
        serve.run(bind(config), name=config.name, route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(Exception):  # the cluster may be what failed
            serve.shutdown()
        ray.shutdown()


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
