"""The application as `build` binds it, over HTTP: three models in three actors behind a coordinator and a router."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
import ray
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from transformers import AutoTokenizer

from actors.config import ConfigError
from actors.metrics import COMMON
from router.app import DIRECTORY_CPUS, MODEL_NAMES, build
from tests.cluster.test_grafana import EXPORTED
from tests.router.test_proxy import JAVA, exchange, request
from tests.support.local_ray import APPLICATION, MAX_SESSIONS, READY_S, SharedRay, trio_args, wait_until
from tests.support.oracle import WEIGHTS, Case, Oracle, choice_seed
from tests.support.trio import chat_prompts

pytestmark = pytest.mark.ray

QUESTION = "Who is the mentor of the rival of Ada?"
MESSAGE = {"role": "user", "content": QUESTION}
SAMPLINGS = ((0.0, 1.0), (0.6, 0.95), (1.0, 1.0))  # temperature, top_p
PROMPTS = MAX_SESSIONS
LENGTH = 32

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]  # by name and labels


@pytest.fixture(scope="module")
def client(shared_ray: SharedRay) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=shared_ray.url, timeout=READY_S) as http:
        yield http


@pytest.fixture
async def openai(shared_ray: SharedRay) -> AsyncIterator[AsyncOpenAI]:
    """OpenAI's client of the service, once every role is served."""
    url = f"{shared_ray.url}/v1"
    async with AsyncOpenAI(base_url=url, api_key="none", timeout=READY_S, max_retries=0) as openai:
        yield openai


def chat(text: str, seed: int, sampling: tuple[float, float]) -> dict[str, Any]:
    temperature, top_p = sampling
    messages = [{"role": "user", "content": text}]
    asked = {"model": APPLICATION, "messages": messages, "seed": seed, "max_tokens": LENGTH}
    return asked | {"temperature": temperature, "top_p": top_p, "extra_body": {"guidance": {"explain": True}}}


async def ask(openai: AsyncOpenAI, text: str, seed: int, sampling: tuple[float, float]) -> ChatCompletion:
    answer: ChatCompletion = await openai.chat.completions.create(**chat(text, seed, sampling))
    return answer


def answer_ids(answer: ChatCompletion) -> list[int]:
    """The tokens of an explained answer."""
    explained: Any = answer.choices[0].model_extra
    return [token["id"] for token in explained["guidance"]["tokens"]]


async def test_served_tokens_are_those_of_plain_forwards(openai: AsyncOpenAI) -> None:
    asked = [(text, sampling) for text in chat_prompts(PROMPTS) for sampling in SAMPLINGS]
    answers = await asyncio.gather(*(ask(openai, text, seed, how) for seed, (text, how) in enumerate(asked)))
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "target")
    cases = []
    for seed, ((text, (temperature, top_p)), answer) in enumerate(zip(asked, answers, strict=True)):
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        prompt = tokenizer.encode(rendered, add_special_tokens=False)
        cases.append(Case(text, prompt, answer_ids(answer), choice_seed(seed, 0), temperature, top_p, LENGTH))
    tally = Oracle().hold(cases)
    print(f"{len(cases)} answers: {tally}")  # shown with -rP
    assert tally.places > 10 * len(cases)
    assert tally.near_ties < 0.001 * tally.places


async def test_stream_has_the_text_of_the_whole_answer(openai: AsyncOpenAI) -> None:
    whole = await ask(openai, QUESTION, 7, SAMPLINGS[1])
    stream = await openai.chat.completions.create(**chat(QUESTION, 7, SAMPLINGS[1]), stream=True)
    choices = [chunk.choices[0] async for chunk in stream]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert choices[-1].finish_reason == whole.choices[0].finish_reason


async def test_sixteen_concurrent_requests_get_the_tokens_of_one_alone(openai: AsyncOpenAI) -> None:
    alone = await ask(openai, QUESTION, 7, SAMPLINGS[2])
    together = await asyncio.gather(*(ask(openai, QUESTION, 7, SAMPLINGS[2]) for _ in range(16)))
    assert [answer_ids(answer) for answer in together] == [answer_ids(alone)] * 16


def test_guided_model_and_each_single_role_answer(client: httpx.Client) -> None:
    names = [card["id"] for card in client.get("/v1/models").raise_for_status().json()["data"]]
    assert names == ["thinklogit", "thinklogit/target", "thinklogit/guider", "thinklogit/guider-base"]
    for name in names:
        body = {"model": name, "messages": [MESSAGE], "temperature": 0, "max_tokens": 40}
        answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
        assert answer["choices"][0]["message"]["content"]
        assert bool(answer["usage"]["guidance"]["guided_tokens"]) is (name == "thinklogit")


def test_client_that_disconnects_frees_its_session(client: httpx.Client) -> None:
    coordinator = serve.get_deployment_handle("Coordinator", APPLICATION)
    endless = {"min_tokens": 3_000, "max_tokens": 3_000, "stream": True, "temperature": 1}
    body = {"model": "thinklogit", "messages": [MESSAGE], **endless}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()  # kept: the response closes with its iterator
        next(lines)
        assert coordinator.load.remote().result(timeout_s=READY_S).sessions == 1
    wait_until(lambda: coordinator.load.remote().result(timeout_s=READY_S).sessions == 0, "the end of the session")


async def test_the_proxy_serves_java_and_odd_headers_with_one_id(shared_ray: SharedRay) -> None:
    port, body = httpx.URL(shared_ray.url).port, json.dumps({"prompt": "Who", "max_tokens": 2}).encode()
    assert port is not None
    for header in (JAVA, b"serve_multiplexed_model_id: \xff", b"x-session-id: \xff", b"X-Request-Id: \xff a/b"):
        answers = await exchange(port, request(header, body=body), request(body=body), answers=2)
        assert [answer.status for answer in answers] == [200, 200], header
        assert [len(answer.request_ids) for answer in answers] == [1, 1], header
    assert answers[0].request_ids == [b"\xff a/b"]


def test_misspelt_argument_is_refused_by_name() -> None:
    args = trio_args()
    args["guidance"]["alhpa"] = 1.0
    with pytest.raises(ConfigError, match=r"guidance\.alhpa: unknown key"):
        build(args)


def published() -> Series:
    """The service's series that Ray's agents export now, of all nodes."""
    texts = [
        httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=READY_S).text
        for node in ray.nodes()
    ]
    return {series: value for text in texts for series, value in series_of(text) if "thinklogit" in series[0]}


def series_of(text: str) -> Iterator[tuple[tuple[str, frozenset[tuple[str, str]]], float]]:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            yield (sample.name, frozenset(sample.labels.items())), sample.value


def total(series: Series, name: str, **labels: str) -> float:
    """The sum of all series of that name with these labels."""
    return sum(
        value for (series_name, tags), value in series.items() if series_name == name and tags >= set(labels.items())
    )


def test_rays_metrics_equal_those_of_the_service(client: httpx.Client) -> None:
    body = {"model": APPLICATION, "messages": [MESSAGE], "max_tokens": LENGTH, "stream": True}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    own = dict(series_of(client.get("/metrics").text))
    tokens = total(own, "thinklogit_completion_tokens_total", model=APPLICATION)
    of_model = {"application": APPLICATION, "model": APPLICATION}
    name = "ray_thinklogit_completion_tokens_total"
    wait_until(lambda: total(published(), name, **of_model) == tokens > 0, "the export of all tokens")
    wait_until(
        lambda: total(published(), "ray_thinklogit_sessions", state="running") == 0, "the export of an idle gauge"
    )
    found = published()
    assert total(found, "ray_thinklogit_requests_total", status="200", **of_model) >= 1
    for bound in ("0.05", "1.0", "+Inf"):
        buckets = "thinklogit_first_token_seconds_bucket"
        of_service = total(own, buckets, model=APPLICATION, le=bound)
        assert total(found, f"ray_{buckets}", le=bound, **of_model) == of_service, bound
    for role in MODEL_NAMES:
        assert total(found, "ray_thinklogit_steps_total", role=role, phase="extend", application=APPLICATION) > 0
        assert total(found, "ray_thinklogit_forward_tokens_total", role=role) > 0
        assert 0 <= total(found, "ray_thinklogit_cache_used_ratio", role=role) <= 1
    assert total(found, "ray_thinklogit_steps_total", role="coordinator", phase="turn") > 0
    assert total(found, "ray_thinklogit_accepted_tokens_total") > 0
    assert {EXPORTED[name].labels for name, _ in found if name in EXPORTED} >= {("role", "phase"), ("state",), ()}
    for series, labels in found:
        if series in EXPORTED:
            assert {name for name, _ in labels} >= {*COMMON, *EXPORTED[series].labels}
    undeclared = {re.sub("_(bucket|count|sum)$", "_bucket", series) for series, _ in found} - set(EXPORTED)
    assert undeclared == set()


def test_missing_model_is_refused_by_role() -> None:
    args = trio_args()
    args["models"]["guider"]["path"] = "/nowhere/guider"
    with pytest.raises(ConfigError, match=r"models\.guider: .*/nowhere/guider"):
        build(args)


def test_each_deployment_is_scaled_by_its_section() -> None:
    args = trio_args()
    args["models"]["target"]["replicas"] = {"min": 1, "max": 4, "target_cache": 0.5, "look_back_s": 6}
    args["coordinator"] = {"max_sessions": 40, "replicas": {"min": 2, "max": 3, "downscale_delay_s": 5}}
    router: Any = build(args)._bound_deployment
    coordinator = router.init_args[1]._bound_deployment
    target, guider, _ = (model._bound_deployment for model in coordinator.init_args[2])
    assert (router._deployment_config.num_replicas, guider._deployment_config.num_replicas) == (1, 1)
    by_requests, by_load = (one._deployment_config.autoscaling_config for one in (coordinator, target))
    assert (by_requests.min_replicas, by_requests.max_replicas) == (2, 3)
    assert (by_requests.target_ongoing_requests, by_requests.downscale_delay_s) == (30, 5)
    assert by_requests.policy.is_default_policy_function()
    assert (by_load.look_back_period_s, by_load.metrics_interval_s) == (6, 2)
    assert by_load.policy.policy_kwargs == {"target_cache": 0.5, "target_waiting": 32}


def test_embedded_trio_fits_on_two_cores() -> None:
    args = trio_args()
    asked = [section["num_cpus"] for section in (*args["models"].values(), args["coordinator"], args["router"])]
    assert sum(asked) + DIRECTORY_CPUS < 1.5
