"""The Serve shells on a cluster of several nodes: where replicas run, and what they share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from ray import serve

from actors.deployments import SECRET_BYTES, application_secret
from actors.requests import Role
from router.app import MODEL_NAMES, build
from tests.local_ray import APPLICATION, labelled_nodes, replicas, trio_args

# Ray leaves sockets and child processes to its own exit handlers.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning:ray"),
]

ROLES: tuple[Role, ...] = ("target", "guider", "guider_base")


@pytest.fixture(scope="module")
def nodes() -> Iterator[dict[Role, str]]:
    """Three nodes, each labelled for a role: the id of each."""
    with labelled_nodes([{"thinklogit-role": role} for role in ROLES]) as ids:
        yield dict(zip(ROLES, ids, strict=True))


def test_each_role_runs_on_the_node_that_its_label_names(nodes: dict[Role, str]) -> None:
    args = trio_args()
    for role in ROLES:
        args["models"][role]["label_selector"] = {"thinklogit-role": role}
    serve.start(proxy_location="Disabled")
    serve.run(build(args), name=APPLICATION)
    found = replicas()
    assert {role: found[MODEL_NAMES[role]].node_id for role in ROLES} == nodes
    status = serve.get_deployment_handle("Directory", APPLICATION).snapshot.remote().result(timeout_s=30)
    assert {endpoint.role for endpoint in status} == set(ROLES)


def test_an_application_has_one_secret_and_no_other_applications(nodes: dict[Role, str]) -> None:
    secret = application_secret("first")
    assert len(secret) == SECRET_BYTES
    assert application_secret("first") == secret
    assert application_secret("second") != secret
    assert secret not in os.environb.values()
