"""The Serve deployments on a cluster of several nodes: where replicas run, and what they share."""

from __future__ import annotations

import os

import pytest
from ray import serve
from ray.util.state.common import ActorState

from actors.api.generation import ROLES, Role
from actors.serve.application import SECRET_BYTES, application_secret
from router.app import MODEL_NAMES
from tests.support.local_ray import APPLICATION, GPUS, SharedRay, replicas

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def models(shared_ray: SharedRay) -> dict[Role, ActorState]:
    """The actor of each role of a service whose roles ask for labelled nodes and for GPUs."""
    assert shared_ray.url
    found = replicas()
    return {role: found[MODEL_NAMES[role]] for role in ROLES}


def test_each_role_runs_on_the_node_with_its_accelerator(shared_ray: SharedRay, models: dict[Role, ActorState]) -> None:
    assert {role: model.node_id for role, model in models.items()} == shared_ray.nodes
    status = serve.get_deployment_handle("Directory", APPLICATION).snapshot.remote().result(timeout_s=30)
    assert {endpoint.role for endpoint in status.endpoints} == set(ROLES)


def test_each_role_has_its_own_actor_with_the_configured_gpus(models: dict[Role, ActorState]) -> None:
    assert len({model.pid for model in models.values()}) == 3
    assert {role: model.required_resources["GPU"] for role, model in models.items()} == GPUS


@pytest.mark.usefixtures("shared_ray")
def test_applications_do_not_share_their_secrets() -> None:
    secret = application_secret("first")
    assert len(secret) == SECRET_BYTES
    assert application_secret("first") == secret
    assert application_secret("second") != secret
    assert secret not in os.environb.values()
