"""The Serve deployments on a cluster of several nodes: where replicas run, and what they share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from ray import serve
from ray.util.state.common import ActorState

from actors.api.generation import ROLES, Role
from actors.serve.application import SECRET_BYTES, application_secret
from router.app import MODEL_NAMES, build
from tests.support.local_ray import ACCELERATOR, APPLICATION, GPU_TYPES, SharedRay, replicas, trio_args

pytestmark = pytest.mark.ray

GPUS: dict[Role, float] = {"target": 2, "guider": 0.5, "guider_base": 0.5}


def models(application: str) -> dict[Role, ActorState]:
    """The actor of each role."""
    found = replicas(application)
    return {role: found[MODEL_NAMES[role]] for role in ROLES}


@pytest.fixture(scope="module")
def with_gpus(shared_ray: SharedRay) -> Iterator[str]:
    """An application whose roles ask for GPUs, beside the shared, batch-invariant service without."""
    args = trio_args()
    for role in ROLES:
        placed = {"label_selector": {ACCELERATOR: GPU_TYPES[role]}, "num_gpus": GPUS[role], "device": "cpu"}
        args["models"][role] |= placed
    name = "with-gpus"
    serve.start(proxy_location="Disabled")
    serve.run(build(args), name=name, route_prefix=None)
    yield name
    serve.delete(name)


def test_each_role_runs_on_the_node_with_its_label(shared_ray: SharedRay) -> None:
    assert shared_ray.url
    found = models(APPLICATION)
    assert {role: model.node_id for role, model in found.items()} == shared_ray.nodes
    assert len({model.pid for model in found.values()}) == 3
    status = serve.get_deployment_handle("Directory", APPLICATION).snapshot.remote().result(timeout_s=30)
    assert {endpoint.role for endpoint in status.endpoints} == set(ROLES)


@pytest.mark.slow
def test_each_role_has_its_own_actor_with_the_configured_gpus(shared_ray: SharedRay, with_gpus: str) -> None:
    found = models(with_gpus)
    assert {role: model.node_id for role, model in found.items()} == shared_ray.nodes
    assert len({model.pid for model in found.values()}) == 3
    assert {role: model.required_resources["GPU"] for role, model in found.items()} == GPUS


@pytest.mark.usefixtures("shared_ray")
def test_applications_do_not_share_their_secrets() -> None:
    secret = application_secret("first")
    assert len(secret) == SECRET_BYTES
    assert application_secret("first") == secret
    assert application_secret("second") != secret
    assert secret not in os.environb.values()
