"""A Ray cluster on this machine that grows: Ray's autoscaler over nodes that are processes here."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray._private.services import get_node_ip_address
from ray.cluster_utils import Cluster

from cluster.launch import OBJECT_STORE_BYTES, free_port
from tests.support.local_ray import ray_settings

HEAD_ID = "f" * 51 + "00000"  # by which the node provider knows the head; it numbers the others after it
MAX_NODES = 2
IDLE_MINUTES = 0.05  # a node that nothing runs on goes after this
_SETTINGS = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
}


@contextlib.contextmanager
def growing_cluster(folder: Path, head: dict[str, float], worker: dict[str, float]) -> Iterator[None]:
    """A head with some resources, nodes with others that come when they are asked for, and a driver.

    folder: for the autoscaler's configuration. No node is there at first.
    """
    port = free_port()
    config = folder / "autoscaler.json"
    config.write_text(json.dumps(_autoscaler(f"{get_node_ip_address()}:{port}", head, worker)), encoding="utf-8")
    with ray_settings(**_SETTINGS):
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": head["CPU"],
                "resources": {name: amount for name, amount in head.items() if name != "CPU"},
                "object_store_memory": OBJECT_STORE_BYTES,
                "include_dashboard": True,
                "dashboard_port": free_port(),
                "gcs_server_port": port,
                "autoscaling_config": str(config),
                "env_vars": {"RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID},
            },
        )
        monitor = cluster.head_node.all_processes["monitor"][0].process.pid
        try:
            ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
            yield
        finally:
            serve.shutdown()
            ray.shutdown()
            left = _descendants(monitor)  # the nodes that the autoscaler started are its children
            cluster.shutdown()
            _end(left)


def nodes() -> list[str]:
    """The ids of the nodes that are alive, beside the head."""
    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != HEAD_ID]


def _autoscaler(gcs_address: str, head: dict[str, float], worker: dict[str, float]) -> dict[str, Any]:
    module = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    provider = {"type": "external", "module": module, "gcs_address": gcs_address, "head_node_id": HEAD_ID}
    types = {
        "ray.head.default": {"resources": head, "node_config": {}, "max_workers": 0},
        "worker": {
            "resources": worker | {"object_store_memory": OBJECT_STORE_BYTES},
            "node_config": {},
            "min_workers": 0,
            "max_workers": MAX_NODES,
        },
    }
    lists = ("cluster_synced_files", "setup_commands", "head_setup_commands", "worker_setup_commands")
    commands = ("initialization_commands", "head_start_ray_commands", "worker_start_ray_commands")
    return {
        "cluster_name": "growing",
        "max_workers": MAX_NODES,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": provider | {"launch_multiple": True},
        "available_node_types": types,
        "head_node_type": "ray.head.default",
        "auth": {},
        "file_mounts": {},
        **{name: [] for name in (*lists, *commands)},
    }


def _descendants(pid: int) -> list[int]:
    """The processes that `pid`, in any of its threads, and its children have started and that run."""
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            found += map(int, thread.read_text(encoding="ascii").split())
    return found + [below for child in found for below in _descendants(child)]


def _end(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
