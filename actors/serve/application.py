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
DRAIN_S = 20.0  # a replica that is told to go may take so long to let its sessions move or end
DIRECTORY_TIMEOUT_S = 2.0  # one message to the directory; a lost one is repeated by the next heartbeat
_NAMESPACE = "thinklogit"


def application_secret(application: str) -> bytes:
    """The secret by which coordinators and models of one application know each other, drawn by whoever asks first.

    It lives in Ray's own key-value store, so that redeploys and a lost directory keep it. Blocks for two calls to the
    cluster's head; needs a connected Ray process.
    """
    key = f"wire-secret:{application}"
    _internal_kv_put(key, secrets.token_bytes(SECRET_BYTES), overwrite=False, namespace=_NAMESPACE)
    kept: bytes = _internal_kv_get(key, namespace=_NAMESPACE)
    return kept


async def own_secret() -> bytes:
    return await asyncio.to_thread(application_secret, serve.get_replica_context().app_name)


def show_logs() -> None:
    """Send the log lines of this project's packages where Serve sends its own: the replica's file and the console."""
    serve_log = logging.getLogger("ray.serve")
    for package in ("actors", "router"):
        log_of_package = logging.getLogger(package)
        log_of_package.setLevel(serve_log.level or logging.INFO)
        log_of_package.handlers = serve_log.handlers
        log_of_package.propagate = False


async def application_details(application: str) -> dict[str, Any] | None:
    """What Serve's controller knows of an application, in Serve's public schema ApplicationDetails; None if nothing."""
    controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    details = await controller.get_serve_instance_details.remote()
    found: dict[str, Any] | None = details["applications"].get(application)
    return found


async def stopping_replicas(application: str) -> frozenset[str]:
    """Ids of the application's replicas that Serve is stopping.

    Serve tells a replica nothing of it while a stream is open there, and kills it in the end; its controller knows.
    """
    details = await application_details(application) or {"deployments": {}}
    replicas = [replica for deployment in details["deployments"].values() for replica in deployment["replicas"]]
    return frozenset(replica["replica_id"] for replica in replicas if replica["state"] == "STOPPING")
