"""The cluster files for `ray up` and KubeRay pass their own validators and place every role on its nodes."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
import yaml
from ray._private.label_utils import validate_node_label_syntax
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig, NodeTypeConfig
from ray.serve.schema import ServeDeploySchema

from actors.api.generation import ROLES
from actors.config import ModelConfig, ServiceConfig
from actors.engine.memory import GIB
from cluster import drain, kuberay
from cluster.estimate import memory_findings
from cluster.launch import PROXY_HOOK
from cluster.serve_file import read_service_config
from tests.support.local_ray import ROOT, wait_until
from tests.support.published_trio import H100, published_estimates

SCHEMAS = "THINKLOGIT_SCHEMAS"  # a folder with KubeRay's rayservice_v1.openapi.json
CLOUDS = ("aws", "gcp")
# Memory of the smallest GPU of each kind of node, as its driver reports it.
MEMORY = {"target": {"aws": H100, "gcp": H100}, "guiders": {"aws": 44 * GIB, "gcp": 39 * GIB}}


@functools.cache
def service() -> ServiceConfig:
    return read_service_config(kuberay.SERVE_FILE)


def cloud_file(cloud: str) -> dict[str, Any]:
    file: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / f"{cloud}.yaml").read_text(encoding="utf-8"))
    return file


def node_types(cloud: str) -> dict[str, NodeTypeConfig]:
    """The node types as Ray's autoscaler reads them, after it has filled in defaults and validated the file."""
    types: dict[str, NodeTypeConfig] = AutoscalingConfig(
        cloud_file(cloud), skip_content_hash=True
    ).get_node_type_configs()
    return types


@functools.cache
def manifest() -> dict[str, Any]:
    file: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / "kuberay.yaml").read_text(encoding="utf-8"))
    return file


def worker_groups() -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in manifest()["spec"]["rayClusterConfig"]["workerGroupSpecs"]}


def models() -> list[ModelConfig]:
    return [service().models.role(role) for role in ROLES]


def selectors() -> list[dict[str, str]]:
    """The label selectors of the models and the coordinators."""
    return [*(model.label_selector for model in models()), service().coordinator.label_selector]


def gpus_wanted(labels: dict[str, str], replicas: Literal["min", "max"]) -> float:
    """GPUs of all replicas that nodes with these labels may run, at each role's smallest or largest count."""
    wanted = [m for m in models() if m.label_selector.items() <= labels.items()]
    counts = [m.replicas.max if replicas == "max" else m.replicas.min for m in wanted]
    return sum(count * m.tensor_parallel * m.num_gpus for count, m in zip(counts, wanted, strict=True))


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_accepts_the_cluster_file(cloud: str) -> None:
    assert {"head", "target", "guiders"} == set(node_types(cloud))


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("wrong", [{"idle_timeout": 5}, {"max_workers": 1}, {"head_node_type": "haed"}])
def test_ray_refuses_a_cluster_file_with_a_mistake(cloud: str, wrong: dict[str, Any]) -> None:
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        AutoscalingConfig(cloud_file(cloud) | wrong, skip_content_hash=True)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_every_label_selector_matches_a_node_type(cloud: str) -> None:
    labelled = [kind.labels for kind in node_types(cloud).values()]
    for selector in selectors():
        assert selector
        assert [labels for labels in labelled if selector.items() <= labels.items()]
    for labels in labelled:
        validate_node_label_syntax(labels)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_node_types_have_gpus_for_all_configured_replicas(cloud: str) -> None:
    for kind in node_types(cloud).values():
        gpus = kind.resources.get("GPU", 0)
        assert gpus * kind.min_worker_nodes >= gpus_wanted(kind.labels, "min") or kind.name == "head"
        assert gpus * kind.max_worker_nodes >= gpus_wanted(kind.labels, "max") or kind.name == "head"
    workers = [kind for name, kind in node_types(cloud).items() if name != "head"]
    assert sum(kind.max_worker_nodes for kind in workers) <= cloud_file(cloud)["max_workers"]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_weights_and_cache_fit_the_gpus_of_their_nodes(cloud: str, tmp_path: Path) -> None:
    for role, costs in published_estimates(service(), tmp_path).items():
        memory = MEMORY[service().models.role(role).label_selector[kuberay.ROLE_LABEL]][cloud]
        assert memory_findings([costs], [memory]) == []


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_head_runs_no_replica_and_every_node_requires_the_token(cloud: str) -> None:
    head = node_types(cloud)["head"]
    assert head.resources == {"CPU": 0, "GPU": 0}
    file = prepare_config(cloud_file(cloud))
    options = " ".join(file["docker"]["run_options"])
    assert "RAY_AUTH_MODE=token" in options
    (path,) = [word.partition("=")[2] for word in options.split() if word.startswith("RAY_AUTH_TOKEN_PATH=")]
    assert str(Path(path).parent) in file["file_mounts"]
    for command in (*file["head_start_ray_commands"], *file["worker_start_ray_commands"]):
        assert "--dashboard-host" not in command  # it stays on the head's loopback interface
    assert "0.0.0.0/0" not in json.dumps(file["provider"])


def test_aws_accepts_the_node_configurations() -> None:
    session = pytest.importorskip("botocore.session", reason="boto3 is not installed")
    validate = pytest.importorskip("botocore.validate")
    shape = session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for kind in cloud_file("aws")["available_node_types"].values():
        report = validate.ParamValidator().validate({**kind["node_config"], "MinCount": 1, "MaxCount": 1}, shape)
        assert not report.has_errors(), report.generate_report()


def test_the_kubernetes_file_equals_the_generators_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert kuberay.main([]) == 0
    assert (ROOT / "cluster" / "kuberay.yaml").read_text(encoding="utf-8") == capsys.readouterr().out


@pytest.mark.parametrize("redis", [[], ["--redis", "redis:6379"]])
def test_the_kubernetes_file_conforms_to_kuberays_schema(redis: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = os.environ.get(SCHEMAS)
    if not folder:
        pytest.skip(f"{SCHEMAS} names no folder with rayservice_v1.openapi.json")
    schema = json.loads((Path(folder) / "rayservice_v1.openapi.json").read_text(encoding="utf-8"))
    assert kuberay.main(redis) == 0
    made = yaml.safe_load(capsys.readouterr().out)
    jsonschema.validate(made, closed(schema))
    made["spec"]["rayClusterConfig"]["authOption"] = {}
    with pytest.raises(jsonschema.ValidationError, match="authOption"):
        jsonschema.validate(made, closed(schema))


def closed(schema: Any) -> Any:
    """The schema with unknown keys as errors, which Kubernetes silently drops, and integer-or-string spelt out."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(part) for key, part in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    return made


def test_the_embedded_serve_config_is_valid_for_ray_and_the_service(tmp_path: Path) -> None:
    text = manifest()["spec"]["serveConfigV2"]
    ServeDeploySchema.model_validate(yaml.safe_load(text))
    file = tmp_path / "inside.yaml"
    file.write_text(text, encoding="utf-8")
    assert read_service_config(file) == service()


def test_pod_groups_have_the_labels_gpus_and_counts_of_their_roles() -> None:
    for selector in selectors():
        assert [group for group in worker_groups().values() if selector.items() <= group["labels"].items()]
    for group in worker_groups().values():
        (container,) = group["template"]["spec"]["containers"]
        gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
        assert gpus * group["minReplicas"] >= gpus_wanted(group["labels"], "min")
        assert gpus * group["maxReplicas"] >= gpus_wanted(group["labels"], "max")
        assert int(container["resources"]["limits"]["cpu"]) <= 12
    assert set(worker_groups()) == {"target", "guiders"}


def test_pods_drain_before_they_stop_and_old_clusters_finish_requests() -> None:
    for group in worker_groups().values():
        pod = group["template"]["spec"]
        command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:3] == ["python", "-m", drain.__name__]
        assert pod["terminationGracePeriodSeconds"] > float(command[-1])
    spec = manifest()["spec"]
    assert spec["rayClusterDeletionDelaySeconds"] >= service().deadlines.request_s
    assert spec["excludeHeadPodFromServeSvc"]


def test_the_kubernetes_file_requires_a_token_and_holds_no_secret() -> None:
    cluster = manifest()["spec"]["rayClusterConfig"]
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["authOptions"]["secretName"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        stated = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
        assert stated == PROXY_HOOK  # everything else comes from secrets


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("host: 0.0.0.0", "host: 127.0.0.1", "cannot be reached from another pod"),
        ("runtime_env:", "runtime_env:\n      working_dir: .", "Expected URI but received path"),
        ("label_selector: {thinklogit-role: target}\n          r", "r", "models.target.label_selector: needs"),
        (
            "thinklogit-role: guiders}\n          replicas: {min: 1, max: 2}\n        guider_base",
            "thinklogit-role: x}\n        guider_base",
            "no GPU product is known for the group x",
        ),
        ("proxy_location", "proxy_locaton", "unknown key"),
    ],
)
def test_the_generator_refuses_files_that_pods_cannot_serve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
) -> None:
    text = kuberay.SERVE_FILE.read_text(encoding="utf-8")
    assert old in text
    file = tmp_path / "serve.yaml"
    file.write_text(text.replace(old, new), encoding="utf-8")
    assert kuberay.main([str(file)]) == 1
    assert message in capsys.readouterr().err


def test_the_generator_refuses_a_laptops_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert kuberay.main([str(ROOT / "ray_config.yaml")]) == 1
    assert "cannot be reached from another pod" in capsys.readouterr().err


@pytest.fixture
def replica() -> Iterator[subprocess.Popen[bytes]]:
    """A process with the title that Ray gives a Serve replica. It lives for a minute."""
    command = ["ray::ServeReplica:app:Target", "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(command, executable=sys.executable) as process:
        yield process
        process.kill()


def test_draining_waits_for_the_last_replica_of_the_machine(
    replica: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drain, "request_drain", lambda seconds: "")
    monkeypatch.setattr(drain, "POLL_S", 0.05)
    here = drain.local_replicas
    monkeypatch.setattr(drain, "local_replicas", lambda: [pid for pid in here() if pid == replica.pid])
    wait_until(lambda: drain.local_replicas() == [replica.pid], "the process's own name", deadline_s=10)
    began = time.monotonic()
    assert drain.main(["--seconds", "1"]) == 1
    assert time.monotonic() - began >= 1
    replica.kill()
    replica.wait()
    assert drain.main(["--seconds", "30"]) == 0


def test_draining_waits_although_ray_refuses_the_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drain, "request_drain", lambda seconds: "no such node")
    answers = iter(([7], []))
    monkeypatch.setattr(drain, "local_replicas", lambda: next(answers))
    assert drain.main([]) == 0
    assert next(answers, None) is None
    assert "no such node" in capsys.readouterr().err
