"""Ray on this machine for a test module: loopback only, free ports, everything gone afterwards."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray import serve
from ray.cluster_utils import Cluster
from ray.util.state import list_actors
from ray.util.state.common import ActorState

from cluster.launch import OBJECT_STORE_BYTES, SETTINGS, free_port

ROOT = Path(__file__).parents[2]
APPLICATION = "thinklogit"
REPLICA = f"ServeReplica:{APPLICATION}:"
READY_S = 240.0  # two busy cores start six processes, for each set of adapters anew


def trio_args() -> dict[str, Any]:
    """The `args` of `ray_config.yaml`, with absolute paths: nothing is uploaded as a working directory."""
    file = yaml.safe_load((ROOT / "ray_config.yaml").read_text(encoding="utf-8"))
    args: dict[str, Any] = file["applications"][0]["args"]
    for model in args["models"].values():
        model["path"] = str(ROOT / model["path"])
    return args


@contextlib.contextmanager
def labelled_nodes(labels: list[dict[str, str]], num_gpus: int) -> Iterator[list[str]]:
    """A cluster of a head and one node with GPUs for each mapping of labels, and a driver; the ids of these nodes."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        common = {"object_store_memory": OBJECT_STORE_BYTES}
        head = {"num_cpus": 2, "include_dashboard": True, "dashboard_port": free_port(), **common}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            nodes = [cluster.add_node(num_cpus=1, num_gpus=num_gpus, labels=mapping, **common) for mapping in labels]
            ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
            yield [node.node_id for node in nodes]
        finally:
            serve.shutdown()
            ray.shutdown()
            cluster.shutdown()


def wait_until(reached: Callable[[], bool], what: str, deadline_s: float = READY_S) -> None:
    """Return once `reached()`; fail the test, saying what was awaited, after the deadline."""
    until = time.monotonic() + deadline_s
    while not reached():
        if time.monotonic() > until:
            pytest.fail(f"{what} did not happen within {deadline_s:g} s")
        time.sleep(0.1)


def replicas() -> dict[str, ActorState]:
    """What Ray's state API knows of the application's replica actors, by deployment: pid, node and resources."""
    return {actor.class_name.removeprefix(REPLICA): actor for actor in replicas_of("")}


def replicas_of(deployment: str) -> list[ActorState]:
    """All living replicas of a deployment; of all deployments for ""."""
    return actors(REPLICA + deployment)


def actors(kind: str) -> list[ActorState]:
    """Living actors whose class name begins so."""
    here = ray.get_runtime_context().gcs_address  # other Rays may run on this machine
    alive = list_actors(here, filters=[("state", "=", "ALIVE")], detail=True, timeout=int(READY_S), limit=1_000)
    return [actor for actor in alive if actor.class_name.startswith(kind)]
