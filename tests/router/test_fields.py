"""Fields of requests whose effect needs models: over HTTP, with the embedded trio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx

from actors.api.generation import Role
from actors.replica.engine_thread import Engine
from router.api import create_app
from tests.support.local_backend import LocalBackend
from tests.support.local_service import local_service, trio_config

QUESTION = {"messages": [{"role": "user", "content": "Who is the mentor of the rival of Ada?"}], "max_tokens": 60}
CLOSING = "\nI must answer now.\n"
SERVED = {
    "thinking": {"start": "<think>", "closing": CLOSING},
    "reasoning_effort": {"brief": {"thinking_tokens": 4}, "off": {"alpha": 0.0}},
    "sampling": {"temperature": 0},
}


@asynccontextmanager
async def served(engines: Mapping[Role, Engine]) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the API before the trio."""
    async with local_service(trio_config(**SERVED), engines) as service:
        app = create_app(service.config, service.tokenizers, LocalBackend(service))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as http:
            yield http


async def ask(http: httpx.AsyncClient, **more: Any) -> dict[str, Any]:
    response = await http.post("/v1/chat/completions", json=QUESTION | more)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def test_a_limit_of_the_thinking_ends_it_with_the_closing_text(trio_engines: Mapping[Role, Engine]) -> None:
    async with served(trio_engines) as http:
        message = (await ask(http, reasoning_effort="brief"))["choices"][0]["message"]
        assert message["reasoning"].endswith(CLOSING)
        own = "; that is all"
        message = (await ask(http, reasoning_effort="brief", thinking={"closing": own}))["choices"][0]["message"]
        assert message["reasoning"].endswith(own)
        hidden = await ask(http, reasoning_effort="brief", include_reasoning=False)
        assert "reasoning" not in hidden["choices"][0]["message"]
        assert hidden["usage"]["completion_tokens_details"]["reasoning_tokens"] > 4  # the closing text counts


async def test_an_effort_without_thinking_or_alpha_uses_the_target_alone(trio_engines: Mapping[Role, Engine]) -> None:
    async with served(trio_engines) as http:
        for effort, thinks in (("none", False), ("off", True)):
            answer = await ask(http, reasoning_effort=effort)
            assert answer["usage"]["guidance"]["guided_tokens"] == 0
            assert bool(answer["usage"]["completion_tokens_details"]["reasoning_tokens"]) is thinks
        answer = await ask(http, reasoning_effort="none", guidance={"alpha": 1})
        assert answer["usage"]["guidance"]["guided_tokens"] == answer["usage"]["completion_tokens"]


async def test_answers_of_models_have_metrics_and_cached_tokens(trio_engines: Mapping[Role, Engine]) -> None:
    async with served(trio_engines) as http:
        answer = await ask(http, include_metrics=True)
        metrics, usage = answer["metrics"], answer["usage"]
        assert 0 <= metrics["queue_time_ms"] <= metrics["time_to_first_token_ms"]
        assert metrics["tokens_per_second"] > 0
        assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
        completion = {"prompt": [QUESTION["messages"][0]["content"] * 2] * 2, "max_tokens": 2}  # type: ignore[index]
        usage = (await http.post("/v1/completions", json=completion)).json()["usage"]
        assert 0 < usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"] / 2
