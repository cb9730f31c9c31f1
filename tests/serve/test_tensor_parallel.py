"""A tensor-parallel model as Serve places it: one rank a bundle, all on one node, replaced together."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from ray import serve
from ray.util.state import list_actors
from ray.util.state.common import ActorState

from actors.config import load_config
from router.app import bind, build
from tests.support.local_ray import APPLICATION, READY_S, labelled_nodes, replicas, trio_args, wait_until

# Ray leaves sockets and child processes to its own exit handlers.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning:ray"),
]


def parallel_args(**target: Any) -> dict[str, Any]:
    args = trio_args()
    args["models"]["target"] |= {"tensor_parallel": 2, "num_cpus": 0.3} | target
    return args


@pytest.fixture(scope="module")
def application() -> Iterator[None]:
    with labelled_nodes([{"ranks": "here"}], num_gpus=0):
        serve.start(proxy_location="Disabled")
        serve.run(build(parallel_args(label_selector={"ranks": "here"})), name=APPLICATION)
        yield


def other_ranks() -> list[ActorState]:
    import ray

    here = ray.get_runtime_context().gcs_address
    actors = list_actors(here, filters=[("state", "=", "ALIVE")], detail=True, timeout=int(READY_S))
    return [actor for actor in actors if actor.class_name == "_Rank"]


def test_a_models_ranks_are_asked_for_in_one_placement_group() -> None:
    args = parallel_args(num_gpus=1, resources={"fast": 1}, label_selector={"zone": "a"})
    coordinator = bind(load_config(args))._bound_deployment.init_args[1]
    target = coordinator._bound_deployment.init_args[2][0]._bound_deployment._replica_config
    assert target.placement_group_bundles == [{"CPU": 0.3, "GPU": 1, "fast": 1}] * 2
    assert target.placement_group_strategy == "STRICT_PACK"
    assert target.placement_group_bundle_label_selector == [{"zone": "a"}] * 2
    assert target.ray_actor_options == {"num_cpus": 0.3, "num_gpus": 1, "resources": {"fast": 1}}


@pytest.mark.usefixtures("application")
def test_the_ranks_share_a_node_and_are_replaced_when_one_dies() -> None:
    leader, (follower,) = replicas()["Target"], other_ranks()
    assert leader.node_id == follower.node_id
    assert leader.placement_group_id == follower.placement_group_id
    assert follower.pid is not None
    os.kill(follower.pid, signal.SIGKILL)

    def replaced() -> bool:
        now, others = replicas().get("Target"), other_ranks()
        return now is not None and now.pid != leader.pid and len(others) == 1 and others[0].pid != follower.pid

    wait_until(replaced, "another replica with another rank")
