"""The Serve shells on a cluster of several nodes: where replicas run, and what they share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from ray import serve
from ray.util.state.common import ActorState

from actors.api.generation import ROLES, Role
from actors.serve.application import SECRET_BYTES, application_secret
from router.app import MODEL_NAMES, build
from tests.support.local_ray import APPLICATION, labelled_nodes, replicas, trio_args

# Ray leaves sockets and child processes to its own exit handlers.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning:ray"),
]

ACCELERATOR = "ray.io/accelerator-type"  # a label that Ray gives a node by its GPUs
GPU_TYPES: dict[Role, str] = {"target": "H100", "guider": "L4", "guider_base": "T4"}
GPUS: dict[Role, float] = {"target": 2, "guider": 0.5, "guider_base": 0.5}


@pytest.fixture(scope="module")
def nodes() -> Iterator[dict[Role, str]]:
    """Three nodes that Ray takes to have two GPUs each, of a type for each role: the id of each."""
    with labelled_nodes([{ACCELERATOR: GPU_TYPES[role]} for role in ROLES], num_gpus=2) as ids:
        yield dict(zip(ROLES, ids, strict=True))


@pytest.fixture(scope="module")
def models(nodes: dict[Role, str]) -> dict[Role, ActorState]:
    """The actor of each role of an application that asks for these nodes and for GPUs."""
    args = trio_args()
    for role in ROLES:
        placed = {"label_selector": {ACCELERATOR: GPU_TYPES[role]}, "num_gpus": GPUS[role], "device": "cpu"}
        args["models"][role].update(placed)
    serve.start(proxy_location="Disabled")
    serve.run(build(args), name=APPLICATION)
    found = replicas()
    return {role: found[MODEL_NAMES[role]] for role in ROLES}


def test_each_role_runs_on_the_node_whose_accelerator_it_names(
    nodes: dict[Role, str], models: dict[Role, ActorState]
) -> None:
    assert {role: model.node_id for role, model in models.items()} == nodes
    status = serve.get_deployment_handle("Directory", APPLICATION).snapshot.remote().result(timeout_s=30)
    assert {endpoint.role for endpoint in status.endpoints} == set(ROLES)


def test_each_role_has_an_actor_of_its_own_with_the_gpus_of_the_config(models: dict[Role, ActorState]) -> None:
    assert len({model.pid for model in models.values()}) == 3
    assert {role: model.required_resources["GPU"] for role, model in models.items()} == GPUS


def test_an_application_has_one_secret_and_no_other_applications(nodes: dict[Role, str]) -> None:
    secret = application_secret("first")
    assert len(secret) == SECRET_BYTES
    assert application_secret("first") == secret
    assert application_secret("second") != secret
    assert secret not in os.environb.values()
