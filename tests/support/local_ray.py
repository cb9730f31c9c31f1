"""Ray clusters on this machine for tests: loopback only, free ports, every process ended afterwards."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml
from ray import serve
from ray.cluster_utils import Cluster
from ray.util.state import list_actors
from ray.util.state.common import ActorState

from actors.api.generation import ROLES, Role
from cluster import launch
from cluster.launch import LOOPBACK, OBJECT_STORE_BYTES, free_port
from router.app import build

ROOT = Path(__file__).parents[2]
APPLICATION = "thinklogit"
READY_S = 240.0  # two busy cores start six processes, for each set of adapters anew
SETTINGS = launch.SETTINGS | {
    "RAY_metrics_report_interval_ms": "1000",  # Ray's shortest
    "RAY_worker_niceness": "0",  # 15 by default, so that the tests of the other process would starve replicas
}

ACCELERATOR = "ray.io/accelerator-type"  # a label that Ray gives a node by its GPUs
GPU_TYPES: dict[Role, str] = {"target": "H100", "guider": "L4", "guider_base": "T4"}
MAX_SESSIONS = 24


def trio_args() -> dict[str, Any]:
    """The `args` of `ray_config.yaml`, with absolute paths: nothing is uploaded as a working directory."""
    file = yaml.safe_load((ROOT / "ray_config.yaml").read_text(encoding="utf-8"))
    args: dict[str, Any] = file["applications"][0]["args"]
    for model in args["models"].values():
        model["path"] = str(ROOT / model["path"])
    return args


def shared_args() -> dict[str, Any]:
    """The `args` of the shared service: the batch-invariant trio, each role on a node of its own."""
    args = trio_args() | {
        "batch_invariant": True,
        "coordinator": {"max_sessions": MAX_SESSIONS},
        "deadlines": {"peer_timeout_s": 5},
    }
    for role in ROLES:
        args["models"][role]["label_selector"] = {ACCELERATOR: GPU_TYPES[role]}
    return args


class SharedRay:
    """A cluster with a node of two GPUs for each role, and the shared service on it; each starts at its first use."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._nodes: dict[Role, str] | None = None
        self._url = ""

    def open(self) -> None:
        """Start the cluster unless it runs, and make this process its driver."""
        if self._nodes is None:
            labels = [{ACCELERATOR: GPU_TYPES[role]} for role in ROLES]
            ids = self._stack.enter_context(labelled_nodes(labels, num_gpus=2))
            self._nodes = dict(zip(ROLES, ids, strict=True))

    def close(self) -> None:
        """End the service and the cluster; a later test opens another."""
        self._nodes, self._url = None, ""
        self._stack.close()

    @property
    def nodes(self) -> dict[Role, str]:
        """The id of the node that is labelled for each role."""
        assert self._nodes is not None, "open() first"
        return self._nodes

    @property
    def dashboard(self) -> str:
        """The address of the dashboard."""
        return f"http://{ray._private.worker.get_dashboard_url()}"

    @property
    def url(self) -> str:
        """The base URL of the shared service, once every role is served; starts it unless it runs."""
        if not self._url:
            url = f"http://{LOOPBACK}:{(port := free_port())}"
            serve.start(proxy_location="HeadOnly", http_options={"host": LOOPBACK, "port": port})
            serve.run(build(shared_args()), name=APPLICATION, route_prefix="/")
            self._url = url
        wait_until_served(self._url)
        return self._url


@contextlib.contextmanager
def ray_settings(**more: str) -> Iterator[None]:
    """The environment that the processes of a test's cluster inherit."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (SETTINGS | more).items():
            patch.setenv(name, value)
        yield


@contextlib.contextmanager
def labelled_nodes(labels: Sequence[dict[str, str]], num_gpus: int) -> Iterator[list[str]]:
    """The ids of a cluster's nodes, one for each mapping of labels, the head first; this process is its driver."""
    with ray_settings():
        common = {"object_store_memory": OBJECT_STORE_BYTES, "num_cpus": 2, "num_gpus": num_gpus}
        dashboard = {"include_dashboard": True, "dashboard_port": free_port()}
        cluster = Cluster(initialize_head=True, head_node_args={"labels": labels[0], **dashboard, **common})
        try:
            nodes = [cluster.head_node, *(cluster.add_node(labels=mapping, **common) for mapping in labels[1:])]
            ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
            yield [node.node_id for node in nodes]
        finally:
            serve.shutdown()
            ray.shutdown()
            cluster.shutdown()


def wait_until(reached: Callable[[], bool], what: str, deadline_s: float = READY_S, poll_s: float = 0.1) -> None:
    """Return once `reached()`; fail the test, naming what was awaited, after the deadline."""
    until = time.monotonic() + deadline_s
    while not reached():
        if time.monotonic() > until:
            pytest.fail(f"{what} did not happen within {deadline_s:g} s")
        time.sleep(poll_s)


def wait_until_served(url: str) -> None:
    """Return once every role of the service at `url` is served."""
    wait_until(lambda: httpx.get(f"{url}/ready", timeout=READY_S).status_code == 200, "every role's start")


def replicas(application: str = APPLICATION) -> dict[str, ActorState]:
    """Ray's state of the application's replica actors, by deployment: pid, node and resources."""
    kind = f"ServeReplica:{application}:"
    return {actor.class_name.removeprefix(kind): actor for actor in actors(kind)}


def replicas_of(deployment: str) -> list[ActorState]:
    """All living replicas of one deployment of the service."""
    name = f"ServeReplica:{APPLICATION}:{deployment}"
    return [actor for actor in actors(name) if actor.class_name == name]  # not GuiderBase for Guider


def actors(kind: str) -> list[ActorState]:
    """Living actors whose class name begins with `kind`."""
    own = ray.get_runtime_context().gcs_address  # other clusters may run on this machine
    alive = list_actors(own, filters=[("state", "=", "ALIVE")], detail=True, timeout=int(READY_S), limit=1_000)
    return [actor for actor in alive if actor.class_name.startswith(kind)]
