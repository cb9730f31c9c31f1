"""Hostile grammars against a whole service: each is decoded or refused, nothing dies, and no neighbour notices."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import httpx
from llguidance import LLMatcher

from actors.api.generation import Generate, Role
from actors.replica.engine_thread import Engine
from router.api import create_app
from router.failover import FailoverBackend
from router.grammars import GrammarChecks
from tests.router.test_failover import Fleet
from tests.support.deadlines import HANG_S
from tests.support.hostile_grammars import Fields, hostile
from tests.support.local_service import LocalService, decode, local_service, trio_config
from tests.support.trio import TEXT, mixed_requests, request, tokens

CASES = int(os.environ.get("HOSTILE_CASES", "24"))  # 200 in `make test-long`
AT_ONCE = 3
JSON = {"Content-Type": "application/json"}
PEOPLE = LLMatcher.grammar_from_json_schema({"type": "array", "items": {"enum": ["Ada", "Bo"]}, "minItems": 3})


def neighbours(service: LocalService) -> list[Generate]:
    return [*mixed_requests(service, 2), replace(request(service.tokenizers, TEXT), grammar=PEOPLE)]


async def ask(http: httpx.AsyncClient, fields: Fields) -> tuple[int, str]:
    """The status of the answer, and a word on what it was."""
    body = {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 12, "temperature": 1, "seed": 1, **fields}
    began = time.monotonic()
    answer = await http.post("/v1/chat/completions", content=json.dumps(body), headers=JSON)
    error = answer.json().get("error", {}).get("message", "")
    print(f"{time.monotonic() - began:5.2f} s {answer.status_code} {json.dumps(fields)[:70]} {error[:110]}")
    return answer.status_code, error


async def test_hostile_grammars_are_decoded_or_refused_and_no_neighbour_notices(
    trio_engines: Mapping[Role, Engine],
) -> None:
    cases = hostile(CASES)
    config = trio_config()
    async with local_service(config, trio_engines) as service:
        (coordinator,) = service.coordinators
        expected = tokens([await decode(coordinator, one) for one in neighbours(service)])
        checks = GrammarChecks(service.tokenizers)
        app = create_app(config, service.tokenizers, FailoverBackend(Fleet(service), config.deadlines), grammars=checks)
        places, found = asyncio.Semaphore(AT_ONCE), Counter[int]()

        async def attack(fields: Fields) -> None:
            async with places:
                status, error = await ask(http, fields)
                found[status] += 1
                # A grammar that is given up in the middle of its answer ends it with an error that says so.
                assert status in (200, 400) or "the grammar was given up" in error, (status, error, str(fields)[:300])

        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service", timeout=HANG_S) as http,
        ):
            attacks = asyncio.gather(*(attack(fields) for fields in cases))
            while not attacks.done():
                assert tokens([await decode(coordinator, one) for one in neighbours(service)]) == expected
            await attacks
            assert checks._checkers["target"]
            answer = await http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": TEXT}]})
            assert answer.status_code == 200
    print(dict(found))
    assert found[200] > CASES / 8
    assert found[400] > CASES / 8
