"""The service on a cluster of three nodes on this machine, each of whose processes can be killed by its kind.

The head has the router, the proxy of the clients and Serve's controller; two other nodes have the models, the
coordinators and the directory, so that a whole node can be lost. With two replicas each node has one of each role.
Nodes of one machine share its cores, its disk and its loopback interface, and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.util.state import list_actors
from ray.util.state.common import ActorState

from actors.api.generation import ROLES
from actors.config import ServiceConfig
from benchmarks.cpu_time import descendants
from cluster.launch import LOOPBACK, OBJECT_STORE_BYTES, SETTINGS, free_port
from router.app import MODEL_NAMES, bind
from tests.support.local_service import WEIGHTS, trio_config

Kind = Literal["target", "guider", "guider_base", "coordinator", "directory", "controller", "proxy", "node"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DEPLOYMENTS: dict[Kind, str] = {
    "target": MODEL_NAMES["target"],
    "guider": MODEL_NAMES["guider"],
    "guider_base": MODEL_NAMES["guider_base"],
    "coordinator": "Coordinator",
    "directory": "Directory",
}
WORKERS = 2
# What Ray takes the nodes to have, whatever it is: the router fits the head alone, and a worker one coordinator.
HEAD_CPUS, ROUTER_CPUS, COORDINATOR_CPUS = 3, 2.5, 0.8
LABELS = {"thinklogit-node": "worker"}
WORKER = {"num_cpus": 1, "resources": dict.fromkeys(ROLES, 1), "labels": LABELS}
MISSING_S = 120.0  # below benchmarks.steady_streams.HANG_S, so that the service says itself what it has lost
READY_S = 180.0  # two busy cores start a dozen processes
ASK_S = 20  # the state API and Serve's controller answer within this, or are asked again
# Ray looks after its machines every 3 s by default, and takes one for dead after five times without an answer.
DEATH_OF_A_NODE = {"RAY_health_check_period_ms": "1000"}


def service_config(replicas: int) -> ServiceConfig:
    """The batch-invariant trio, placed by what a node has: one replica of each role at most, the router at the head."""
    count = {"min": replicas, "max": replicas}
    models = {
        role: {"path": str(WEIGHTS / role), "num_cpus": 0.01, "resources": {role: 1}, "replicas": count}
        for role in ROLES
    }
    return trio_config(
        models=models,
        coordinator={"num_cpus": COORDINATOR_CPUS, "replicas": count, "label_selector": LABELS},
        router={"num_cpus": ROUTER_CPUS},
        deadlines={"reconnect_timeout_s": MISSING_S},
    )


@dataclass(frozen=True, slots=True)
class Killed:
    """One kill. at: on `time.monotonic`."""

    kind: Kind
    at: float


class ServedCluster:
    """The service on its nodes. Methods block; any thread may call them."""

    def __init__(self, config: ServiceConfig, nodes: Cluster, url: str) -> None:
        self.config, self.url = config, url
        self._cluster = nodes
        self._changing = threading.Lock()  # Ray's cluster of nodes is not thread-safe
        self._wanted: dict[Kind, int] = {"coordinator": config.coordinator.replicas.min, "directory": 1}
        self._wanted |= {role: config.models.role(role).replicas.min for role in ROLES}

    def whole(self) -> set[Kind]:
        """Kinds of which every expected process serves, so that one may be killed.

        A node may be when all else is whole too: then another has what it had.
        """
        with contextlib.suppress(Exception):  # the controller or the state API may be away; then nothing is known
            return self._whole()
        return set()

    def kill(self, kind: Kind, draw: random.Random) -> Killed:
        """End one process of a kind, or all of a node, by SIGKILL; a node is brought back at once."""
        if kind == "node":
            return self._lose_node(draw)
        victim = draw.choice(self.processes()[kind])
        os.kill(victim.pid, signal.SIGKILL)
        return Killed(kind, time.monotonic())

    def processes(self) -> dict[Kind | str, list[ActorState]]:
        """The living actors of this cluster by kind; "router" and "head_proxy" are never killed."""
        here = ray.get_runtime_context().gcs_address  # other Rays may run on this machine
        actors = list_actors(here, filters=[("state", "=", "ALIVE")], detail=True, limit=1_000, timeout=ASK_S)
        found: dict[Kind | str, list[ActorState]] = {}
        for actor in actors:
            kind = self._kind(actor)
            if kind is not None and _is_ray(actor.pid):
                found.setdefault(kind, []).append(actor)
        return found

    def check_caches(self) -> dict[str, int]:
        """Sessions left in every model replica, once it has proved its cache's accounts; AssertionError if it fails."""
        left: dict[str, int] = {}
        for role in ROLES:
            replica = serve.get_deployment_handle(DEPLOYMENTS[role], self.config.name)
            seen: dict[str, int] = {}
            while len(seen) < self._wanted[role]:  # Serve's handle asks one of the replicas, of its own choice
                incarnation, sessions = replica.check_cache.remote().result(timeout_s=ASK_S)
                seen[incarnation] = sessions
            left |= {f"{role} {incarnation}": sessions for incarnation, sessions in seen.items()}
        return left

    def _whole(self) -> set[Kind]:
        living = self.processes()
        status = serve.status()
        states = status.applications[self.config.name].deployments
        served: set[Kind] = {
            kind
            for kind, name in DEPLOYMENTS.items()
            if len(living.get(kind, ())) == self._wanted[kind]
            and states[name].replica_states == {"RUNNING": self._wanted[kind]}
        }
        healthy = {node for node, state in status.proxies.items() if state.value == "HEALTHY"}
        if living.get("controller"):
            served.add("controller")
        if any(proxy.node_id in healthy for proxy in living.get("proxy", ())):
            served.add("proxy")
        nodes = [node for node in ray.nodes() if node["Alive"]]
        if len(served) == len(KINDS) - 1 and len(nodes) == WORKERS + 1 and not self._changing.locked():
            served.add("node")
        return served

    def _lose_node(self, draw: random.Random) -> Killed:
        with self._changing:
            node = draw.choice(sorted(self._cluster.worker_nodes, key=lambda node: str(node.node_id)))
            raylet = node.all_processes["raylet"][0].process.pid
            for pid in [raylet, *descendants(raylet)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            killed = Killed("node", time.monotonic())
            self._cluster.remove_node(node, allow_graceful=False)
            self._cluster.add_node(wait=True, **WORKER, object_store_memory=OBJECT_STORE_BYTES)
        return killed

    def _kind(self, actor: ActorState) -> Kind | str | None:
        prefix = f"ServeReplica:{self.config.name}:"
        if actor.class_name.startswith(prefix):
            name = actor.class_name.removeprefix(prefix)
            return next((kind for kind, deployment in DEPLOYMENTS.items() if deployment == name), name.lower())
        if actor.class_name == "ProxyActor":
            return "head_proxy" if actor.node_id == self._cluster.head_node.node_id else "proxy"
        return "controller" if actor.class_name.startswith("ServeController") else None


@contextlib.contextmanager
def served_cluster(config: ServiceConfig) -> Iterator[ServedCluster]:
    """The service of `service_config`, complete; all its nodes and processes end afterwards."""
    settings = {**SETTINGS, **DEATH_OF_A_NODE, "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(free_port())}
    # Ray prints what it hears of processes that die, and standard output is the result's.
    with environment(settings), contextlib.redirect_stdout(sys.stderr):
        head = {"num_cpus": HEAD_CPUS, "include_dashboard": True, "dashboard_port": free_port()}
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the nodes end with this
        nodes = Cluster(
            initialize_head=True,
            head_node_args={**head, "object_store_memory": OBJECT_STORE_BYTES},
            shutdown_at_exit=False,  # it sets signal handlers, which a thread that adds a node cannot
        )
        try:
            for _ in range(WORKERS):
                nodes.add_node(wait=True, **WORKER, object_store_memory=OBJECT_STORE_BYTES)
            ray.init(address=nodes.address, log_to_driver=False, configure_logging=False)
            port = free_port()
            serve.start(proxy_location="EveryNode", http_options={"host": LOOPBACK, "port": port})
            serve.run(bind(config), name=config.name, route_prefix="/")
            served = ServedCluster(config, nodes, f"http://{LOOPBACK}:{port}")
            await_whole(served)
            yield served
        finally:
            with contextlib.suppress(Exception):  # its controller may be the one that was killed last
                serve.shutdown()
            ray.shutdown()
            nodes.shutdown()


def await_whole(served: ServedCluster, deadline_s: float = READY_S) -> None:
    """Return once every process serves. Raises TimeoutError that names those that do not."""
    until = time.monotonic() + deadline_s
    while len(whole := served.whole()) < len(KINDS):
        if time.monotonic() > until:
            missing = sorted(set(KINDS) - whole)
            raise TimeoutError(f"after {deadline_s:g} s these are not whole: {', '.join(missing)}")
        time.sleep(0.5)


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Variables of the environment, which Ray's processes inherit, as long as the context lasts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _is_ray(pid: int) -> bool:
    """True if a process is still the actor that Ray's records name: its id may belong to another process by now."""
    with contextlib.suppress(OSError):
        return b"ray::" in (Path("/proc") / str(pid) / "cmdline").read_bytes()
    return False
