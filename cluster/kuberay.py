"""`cluster/kuberay.yaml` from a Serve config file: a RayService whose worker groups follow from where the roles go.

    python -m cluster.kuberay [cluster/serve_cluster.yaml] [--image IMAGE] [--redis HOST:PORT] > cluster/kuberay.yaml

Roles with the same `label_selector` share the pods of one group. A pod has the GPUs that one replica of each of them
needs, and there are as many pods as they have replicas. Exit status 1, with the reasons, for a file that would not
serve from pods.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from actors.api.generation import ROLES
from actors.config import ConfigError, Replicas, ServiceConfig
from cluster.serve_file import read_mapping, read_service_config

SERVE_FILE = Path(__file__).parent / "serve_cluster.yaml"
ROLE_LABEL = "thinklogit-role"  # the label by which `label_selector` finds a role's nodes; its value names their group
IMAGE = "registry.example.com/thinklogit:0.1.0"
GPU_PRODUCTS = {
    "target": "NVIDIA-H100-80GB-HBM3",
    "guiders": "NVIDIA-L40S",
}  # values of the label nvidia.com/gpu.product
NAME = "thinklogit"
TOKEN_SECRET = "thinklogit-token"  # noqa: S105 - the name of a Kubernetes secret; its key is auth_token
HUB_SECRET, REDIS_SECRET = "thinklogit-hub", "thinklogit-redis"
WEIGHTS_CLAIM = "thinklogit-weights"
HUB_CACHE = "/home/ray/.cache/huggingface"
USER = 1000  # `ray` in the image
DRAIN_S = 600  # a pod that must go waits so long for the replacements of its replicas, which load their weights first
GRACE_S = DRAIN_S + 30  # after which Kubernetes kills it; Ray itself needs some seconds to stop
OBJECT_STORE_BYTES = 2**31  # nothing large goes through it
SPARE_CPUS = 2  # of a pod: Ray's own processes, the proxy and the directory
MEMORY_PER_GPU = 48  # GiB
IDLE_S = 600  # a pod without a replica goes after so long
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Group:
    """Pods that play the same roles. gpus, cpus: of one pod."""

    name: str
    labels: dict[str, str]
    gpus: int
    cpus: int
    replicas: Replicas


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the manifest; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.kuberay", description="A RayService of a Serve config file."
    )
    parser.add_argument("file", type=Path, nargs="?", default=SERVE_FILE, help="default: cluster/serve_cluster.yaml")
    parser.add_argument("--image", default=IMAGE, help="what the pods run, code included")
    parser.add_argument(
        "--redis", metavar="HOST:PORT", help="keep the head's state there, so that a new head resumes it"
    )
    parser.add_argument("--gpu", action="append", default=[], metavar="GROUP=PRODUCT", help="as nvidia.com/gpu.product")
    options = parser.parse_args(arguments)
    try:
        products = GPU_PRODUCTS | dict(_pair(text) for text in options.gpu)
        manifest = ray_service(options.file, options.image, products, options.redis)
    except ConfigError as error:
        print("\n".join(f"error {options.file}: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 1
    print(
        "# Made by `python -m cluster.kuberay > cluster/kuberay.yaml`: edit cluster/serve_cluster.yaml, make it anew."
    )
    print("# Needs KubeRay 1.6 or later, and what docs/deploy.md makes first: two secrets and a volume of weights.")
    print(yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=120), end="")
    return 0


def ray_service(file: Path, image: str, products: dict[str, str], redis: str | None = None) -> dict[str, Any]:
    """The manifest. Raises ConfigError for what is wrong in the file, or cannot be served from pods."""
    config = read_service_config(file)
    _require_reachable(read_mapping(file))
    storage = {"gcsFaultToleranceOptions": _redis(redis)} if redis else {}
    cluster = {
        "rayVersion": version("ray"),
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"version": "v2", "upscalingMode": "Default", "idleTimeoutSeconds": IDLE_S},
        "authOptions": {"mode": "token", "secretName": TOKEN_SECRET},
        **storage,
        "headGroupSpec": _head(image),
        "workerGroupSpecs": [_workers(group, image, products) for group in groups(config)],
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": NAME},
        "spec": {
            "upgradeStrategy": {"type": "NewCluster"},
            # The old cluster of an upgrade answers what it has begun.
            "rayClusterDeletionDelaySeconds": math.ceil(config.deadlines.request_s),
            "excludeHeadPodFromServeSvc": True,
            "serveConfigV2": _Text(file.read_text(encoding="utf-8")),
            "rayClusterConfig": cluster,
        },
    }


def groups(config: ServiceConfig) -> list[Group]:
    """The worker groups that the roles' placement asks for. Raises ConfigError for a role without a group."""
    members: dict[str, list[Any]] = {}
    for role in ROLES:
        model = config.models.role(role)
        if ROLE_LABEL not in model.label_selector:
            raise ConfigError(f"models.{role}.label_selector: must say {ROLE_LABEL}, the name of its group of pods")
        members.setdefault(model.label_selector[ROLE_LABEL], []).append(model)
    found = []
    for name, models in members.items():
        if len({tuple(sorted(model.label_selector.items())) for model in models}) > 1:
            raise ConfigError(f"models: the roles of {ROLE_LABEL}: {name} must have the same label_selector")
        labels = models[0].label_selector
        gpus = sum(model.tensor_parallel * model.num_gpus for model in models)
        cpus = sum(model.tensor_parallel * model.num_cpus for model in models)
        # Every group has room for the replicas that run anywhere: one more router, and coordinators that want it.
        cpus += config.router.num_cpus * config.router.replicas.min
        if config.coordinator.label_selector.items() <= labels.items():
            cpus += config.coordinator.num_cpus * config.coordinator.replicas.min
        pods = Replicas(
            min=max(model.replicas.min for model in models), max=max(model.replicas.max for model in models)
        )
        found.append(Group(name, labels, math.ceil(gpus), math.ceil(cpus) + SPARE_CPUS, pods))
    return found


def _head(image: str) -> dict[str, Any]:
    """No CPUs for replicas: what loses the head loses no model."""
    container = _container("ray-head", image, {"cpu": "4", "memory": "16Gi"})
    ports = {"gcs": 6379, "dashboard": 8265, "client": 10001, "serve": 8000, "metrics": 8080}
    container["ports"] = [{"name": name, "containerPort": port} for name, port in ports.items()]
    start = {"num-cpus": "0", "dashboard-host": "0.0.0.0", "object-store-memory": str(OBJECT_STORE_BYTES)}  # noqa: S104
    return {"rayStartParams": start, "template": {"spec": _pod(container)}}


def _workers(group: Group, image: str, products: dict[str, str]) -> dict[str, Any]:
    memory = f"{MEMORY_PER_GPU * max(1, group.gpus)}Gi"
    gpus = {"nvidia.com/gpu": str(group.gpus)} if group.gpus else {}
    container = _container("ray-worker", image, {"cpu": str(group.cpus), "memory": memory, **gpus})
    drain = ["python", "-m", "cluster.drain", "--seconds", str(DRAIN_S)]
    container["lifecycle"] = {"preStop": {"exec": {"command": drain}}}
    pod = _pod(container) | {"terminationGracePeriodSeconds": GRACE_S, "automountServiceAccountToken": False}
    if group.gpus:
        if group.name not in products:
            raise ConfigError(f"no GPU product is known for the group {group.name}: say --gpu {group.name}=PRODUCT")
        pod["nodeSelector"] = {"nvidia.com/gpu.product": products[group.name]}
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {
        "groupName": group.name,
        "replicas": group.replicas.min,
        "minReplicas": group.replicas.min,
        "maxReplicas": group.replicas.max,
        "labels": group.labels,
        "rayStartParams": {"object-store-memory": str(OBJECT_STORE_BYTES)},
        "template": {"spec": pod},
    }


def _container(name: str, image: str, resources: dict[str, str]) -> dict[str, Any]:
    token = {"secretKeyRef": {"name": HUB_SECRET, "key": "token", "optional": True}}
    return {
        "name": name,
        "image": image,
        "env": [{"name": "HF_TOKEN", "valueFrom": token}],
        "resources": {"requests": resources, "limits": resources},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "weights", "mountPath": HUB_CACHE}],
    }


def _pod(container: dict[str, Any]) -> dict[str, Any]:
    return {
        "restartPolicy": "Never",  # the autoscaler counts a pod as one node: a restarted one would be another
        "securityContext": {"runAsNonRoot": True, "runAsUser": USER, "fsGroup": USER},
        "containers": [container],
        "volumes": [{"name": "weights", "persistentVolumeClaim": {"claimName": WEIGHTS_CLAIM}}],
    }


def _redis(address: str) -> dict[str, Any]:
    password = {"valueFrom": {"secretKeyRef": {"name": REDIS_SECRET, "key": "password"}}}
    return {"redisAddress": address, "redisPassword": password}


def _require_reachable(file: dict[str, Any]) -> None:
    host = (file.get("http_options") or {}).get("host", LOOPBACK[0])
    if host in LOOPBACK:
        raise ConfigError(f"http_options.host: {host} cannot be reached from another pod; say 0.0.0.0")


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ConfigError(f"--gpu {text}: say GROUP=PRODUCT")
    return name, value


class _Text(str):
    """A string that is written as a block, line by line."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        """Everything stands where it is used."""
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Lists are indented below their key."""
        super().increase_indent(flow, False)


_Dumper.add_representer(_Text, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|"))


if __name__ == "__main__":
    sys.exit(main())
