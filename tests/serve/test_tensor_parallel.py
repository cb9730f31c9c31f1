"""A tensor-parallel model as Serve places it: one rank of vLLM per bundle, all on one node, replaced together."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from ray import serve
from ray.util.state.common import ActorState

from actors.config import load_config
from actors.preflight import VLLM_PYTHON
from router.app import bind, build
from tests.support.local_ray import ACCELERATOR, GPU_TYPES, actors, replicas, trio_args, wait_until

APPLICATION = "ranks"  # beside the shared service


def parallel_args(**target: Any) -> dict[str, Any]:
    args = trio_args()
    args["models"]["target"] |= {"tensor_parallel": 2, "num_cpus": 0.3} | target
    return args


@pytest.fixture(scope="module")
def application(shared_ray: None) -> Iterator[None]:
    serve.start(proxy_location="Disabled")
    selector = {ACCELERATOR: GPU_TYPES["target"]}
    serve.run(build(parallel_args(label_selector=selector)), name=APPLICATION, route_prefix=None)
    yield
    serve.delete(APPLICATION)


def other_ranks() -> list[ActorState]:
    return actors("_Rank")


def test_ranks_are_requested_in_one_placement_group() -> None:
    image = {"runtime_env": {"image_uri": "registry/with-vllm"}}
    args = parallel_args(num_gpus=1, resources={"fast": 1}, label_selector={"zone": "a"}, **image)
    coordinator = bind(load_config(args))._bound_deployment.init_args[1]
    target = coordinator._bound_deployment.init_args[2][0]._bound_deployment._replica_config
    assert target.placement_group_bundles == [{"CPU": 0.3, "GPU": 1, "fast": 1}] * 2
    assert target.placement_group_strategy == "STRICT_PACK"
    assert target.placement_group_bundle_label_selector == [{"zone": "a"}] * 2
    assert target.ray_actor_options == {"num_cpus": 0.3, "num_gpus": 1, "resources": {"fast": 1}} | image


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(not VLLM_PYTHON.exists(), reason="needs `make venv-vllm`")
@pytest.mark.usefixtures("application")
def test_ranks_share_a_node_and_are_replaced_together() -> None:
    leader, (follower,) = replicas(APPLICATION)["Target"], other_ranks()
    assert leader.node_id == follower.node_id
    assert leader.placement_group_id == follower.placement_group_id
    assert follower.pid is not None
    os.kill(follower.pid, signal.SIGKILL)

    def replaced() -> bool:
        now, others = replicas(APPLICATION).get("Target"), other_ranks()
        return now is not None and now.pid != leader.pid and len(others) == 1 and others[0].pid != follower.pid

    wait_until(replaced, "the start of another replica with another rank")
