"""The application as `build` binds it, over HTTP: three models in three actors behind a coordinator and a router."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from ray import serve

from actors.config import ConfigError
from router.app import DIRECTORY_CPUS, MODEL_NAMES, build
from tests.local_ray import APPLICATION, LOOPBACK, READY_S, free_port, local_ray, replicas, trio_args, wait_until

# Ray leaves sockets and child processes to its own exit handlers.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning:ray"),
]

QUESTION = {"role": "user", "content": "Who is the mentor of the rival of Ada?"}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    args = trio_args()
    for gpus, model in zip((2, 0.5, 0.5), args["models"].values(), strict=True):
        model["num_gpus"] = gpus
    with local_ray(num_cpus=2, num_gpus=3):
        port = free_port()
        serve.start(http_options={"host": LOOPBACK, "port": port}, proxy_location="HeadOnly")
        serve.run(build(args), name=APPLICATION, route_prefix="/")
        with httpx.Client(base_url=f"http://{LOOPBACK}:{port}", timeout=READY_S) as http:
            wait_until(lambda: http.get("/ready").status_code == 200, "every role being there")
            yield http


def test_the_guided_model_and_each_role_alone_answer(client: httpx.Client) -> None:
    names = [card["id"] for card in client.get("/v1/models").raise_for_status().json()["data"]]
    assert names == ["thinklogit", "thinklogit/target", "thinklogit/guider", "thinklogit/guider-base"]
    for name in names:
        body = {"model": name, "messages": [QUESTION], "temperature": 0, "max_tokens": 40}
        answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
        assert answer["choices"][0]["message"]["content"]
        assert bool(answer["usage"]["guidance"]["guided_tokens"]) is (name == "thinklogit")


def test_the_roles_run_in_three_actors_with_the_gpus_of_the_config(client: httpx.Client) -> None:
    models = {name: replica for name, replica in replicas().items() if name in MODEL_NAMES.values()}
    assert len({replica.pid for replica in models.values()}) == 3
    assert {name: replica.required_resources["GPU"] for name, replica in models.items()} == {
        "Target": 2,
        "Guider": 0.5,
        "GuiderBase": 0.5,
    }


def test_a_client_that_leaves_its_stream_frees_its_session(client: httpx.Client) -> None:
    coordinator = serve.get_deployment_handle("Coordinator", APPLICATION)
    endless = {"min_tokens": 3_000, "max_tokens": 3_000, "stream": True, "temperature": 1}
    body = {"model": "thinklogit", "messages": [QUESTION], **endless}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()  # kept: the response closes with its iterator
        next(lines)
        assert coordinator.load.remote().result(timeout_s=READY_S).sessions == 1
    wait_until(lambda: coordinator.load.remote().result(timeout_s=READY_S).sessions == 0, "the end of the session")


def test_a_misspelt_argument_is_refused_by_name() -> None:
    args = trio_args()
    args["guidance"]["alhpa"] = 1.0
    with pytest.raises(ConfigError, match=r"guidance\.alhpa: unknown key"):
        build(args)


def test_a_model_that_is_not_there_is_refused_by_role() -> None:
    args = trio_args()
    args["models"]["guider"]["path"] = "/nowhere/guider"
    with pytest.raises(ConfigError, match=r"models\.guider: .*/nowhere/guider"):
        build(args)


def test_the_embedded_trio_leaves_room_on_two_cores() -> None:
    args = trio_args()
    asked = [section["num_cpus"] for section in (*args["models"].values(), args["coordinator"], args["router"])]
    assert sum(asked) + DIRECTORY_CPUS < 1.5
