"""The service's OpenAPI document, compared with the application's behaviour."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

import hypothesis
import jsonschema
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from router.api import create_app
from router.openapi import VERSION, document
from tests.support.scripted_service import ScriptedBackend, client, config, tokenizers

pytest_plugins = ["schemathesis.pytest.plugin"]  # here alone: it takes seconds to import
CASES = int(os.environ.get("API_CASES", "100"))  # per operation
CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
APP = create_app(config(), tokenizers(), ScriptedBackend())
DESCRIBED = schemathesis.openapi.from_asgi("/openapi.json", APP)


@DESCRIBED.parametrize()
@hypothesis.settings(
    max_examples=CASES,
    deadline=60_000,  # milliseconds: a case that takes longer hangs
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
def test_no_generated_body_breaks_the_service(case: schemathesis.Case[Any]) -> None:
    case.call_and_validate(checks=CHECKS)


async def described(name: str) -> dict[str, Any]:
    """One schema of the document."""
    spec = document(APP, config().served_names)
    return {"$ref": f"#/components/schemas/{name}", "components": spec["components"]}


BODIES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}, "ChatAnswer", "ChatChunk"),
    "completions": ("/v1/completions", {"prompt": ["Hi", "Ho"]}, "TextAnswer", "TextChunk"),
}


@pytest.mark.parametrize("address", BODIES)
async def test_responses_and_chunks_match_the_document(address: str) -> None:
    path, body, whole, part = BODIES[address]
    request = body | {"model": "duo", "n": 2, "return_token_ids": True, "guidance": {"explain": True}}
    usage = {"include_usage": True, "continuous_usage_stats": True}
    async with client(ScriptedBackend(thought="So Eve")) as http:
        answer = await http.post(path, json=request)
        stream = await http.post(path, json=request | {"stream": True, "stream_options": usage})
    jsonschema.validate(answer.json(), await described(whole))
    *events, last = stream.text.strip().split("\n\n")
    assert last == "data: [DONE]"
    for event in events:
        jsonschema.validate(json.loads(event.removeprefix("data: ")), await described(part))


async def test_the_document_has_every_route_and_resolves() -> None:
    async with client(ScriptedBackend()) as http:
        spec = (await http.get("/openapi.json")).json()
    stated = {(path, method.upper()) for path, item in spec["paths"].items() for method in item}
    assert stated == {
        ("/v1/chat/completions", "POST"),
        ("/v1/completions", "POST"),
        ("/tokenize", "POST"),
        ("/detokenize", "POST"),
        ("/health", "GET"),
        ("/ready", "GET"),
        ("/version", "GET"),
        ("/v1/models", "GET"),
        ("/v1/models/{name}", "GET"),
    }
    named = {part.split('"')[0] for part in json.dumps(spec).split("#/components/schemas/")[1:]}
    assert named <= spec["components"]["schemas"].keys()


async def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parent.parent.parent / "pyproject.toml").read_text())["project"]
    async with client(ScriptedBackend()) as http:
        assert (await http.get("/version")).json() == {"version": project["version"]} == {"version": VERSION}
