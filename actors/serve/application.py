"""State that the deployments of one application share: the wire's secret, logging, and the Serve controller's view.

This module uses names that are private to Ray, so `pyproject.toml` bounds Ray's version: `_internal_kv_get` and
`_internal_kv_put`, the name of Serve's controller, and the controller's `get_serve_instance_details`. Public names do
not do: `serve.status()` blocks and names no replica, and a secret among a deployment's arguments would change, and
restart the deployment, each time the application is deployed.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import Any

import ray
from ray import serve
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

SECRET_BYTES = 32
DRAIN_S = 20.0  # a stopping replica waits so long for its sessions to move or end
DIRECTORY_TIMEOUT_S = 2.0  # one call to the directory; a lost one is repeated by the next heartbeat
_NAMESPACE = "thinklogit"


def application_secret(application: str) -> bytes:
    """The secret with which the coordinators and models of one application authenticate; the first call draws it.

    It is kept in Ray's key-value store, so it survives a redeploy and the loss of the directory. Blocks for two calls
    to the cluster's head. The process must be connected to Ray.
    """
    key = f"wire-secret:{application}"
    _internal_kv_put(key, secrets.token_bytes(SECRET_BYTES), overwrite=False, namespace=_NAMESPACE)
    kept: bytes = _internal_kv_get(key, namespace=_NAMESPACE)
    return kept


async def own_secret() -> bytes:
    return await asyncio.to_thread(application_secret, serve.get_replica_context().app_name)


def show_logs() -> None:
    """Send the log lines of this project's packages to Serve's handlers: the replica's log file and the console."""
    serve_log = logging.getLogger("ray.serve")
    for package in ("actors", "router"):
        log_of_package = logging.getLogger(package)
        log_of_package.setLevel(serve_log.level or logging.INFO)
        log_of_package.handlers = serve_log.handlers
        log_of_package.propagate = False


async def application_details(application: str) -> dict[str, Any] | None:
    """The controller's view of an application, in Serve's public schema ApplicationDetails; None if it has none."""
    controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    details = await controller.get_serve_instance_details.remote()
    found: dict[str, Any] | None = details["applications"].get(application)
    return found


async def stopping_replicas(application: str) -> frozenset[str]:
    """Ids of the application's replicas that Serve is stopping.

    Serve does not notify a replica while it has an open stream, and kills it in the end. The controller has the list.
    """
    details = await application_details(application) or {"deployments": {}}
    replicas = [replica for deployment in details["deployments"].values() for replica in deployment["replicas"]]
    return frozenset(replica["replica_id"] for replica in replicas if replica["state"] == "STOPPING")
