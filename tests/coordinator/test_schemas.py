"""Generated JSON schemas: every answer that ends by itself is an instance of its schema, and every answer ends."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from actors.api.generation import Finished, Generate, Role
from actors.api.guidance import Guidance
from actors.api.sampling_params import Sampling
from actors.config import ServiceConfig
from actors.replica.engine_thread import Engine
from router.grammars import grammar_text
from router.schema import ChatRequest, parse
from tests.support import families
from tests.support.generated_schemas import Schema, schemas
from tests.support.local_service import LocalService, local_service, trio_config
from tests.support.trained_models import tokenizer
from tests.support.trio import chat_prompts, decode_all, request

LONG = int(os.environ.get("SCHEMA_CASES", "100"))  # `make test-long` sets it to 300
FEW, BATCH = 12, 50
SERVICE: dict[str, Any] = {
    "coordinator": {"max_sessions": 64, "max_waiting": 2_000},
    "speculation": {"drafts": 4, "adapt": False},
}


def requests(service: LocalService, wanted: list[Schema], ways: list[tuple[Sampling, float]]) -> list[Generate]:
    """One request for each schema, as the router makes it, in each way in turn; two of three allow no white space."""
    found = []
    for number, (schema, text) in enumerate(zip(wanted, itertools.cycle(chat_prompts(100)), strict=False)):
        form: dict[str, Any] = {
            "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        }
        if number % 3:
            form = {"structured_outputs": {"json": schema, "disable_any_whitespace": True}}
        grammar, _ = grammar_text(parse(ChatRequest, {"messages": [{"role": "user", "content": "?"}], **form}))
        sampling, alpha = ways[number % len(ways)]
        one = request(service.tokenizers, text, sampling=sampling, guidance=Guidance(alpha), seed=number)
        found.append(replace(one, grammar=grammar))
    return found


async def check(
    config: ServiceConfig, engines: Mapping[Role, Engine], wanted: list[Schema], ways: list[tuple[Sampling, float]]
) -> None:
    async with local_service(config, engines) as service:
        answers = await decode_all(service.coordinators[0], requests(service, wanted, ways))
    ended = 0
    for schema, answer in zip(wanted, answers, strict=True):
        assert isinstance(answer.end, Finished)
        assert answer.end.reason in ("stop", "length"), (answer.end, schema)
        if answer.end.reason == "stop":
            ended += 1
            assert_instance(answer.content, schema)
    print(f"{ended} of {len(wanted)} answers ended by themselves")
    assert ended


def assert_instance(content: str, schema: Schema) -> None:
    value: Any = json.loads(content)
    faults = list(jsonschema.Draft202012Validator(schema).iter_errors(value))
    assert not faults, (content, schema, faults[0].message)


GREEDY, SAMPLED = Sampling(temperature=0, max_tokens=96), Sampling(temperature=1, max_tokens=96)
ALL_WAYS = [(GREEDY, 0.0), (SAMPLED, 1.0), (GREEDY, 1.0), (SAMPLED, 0.0)]
WAYS = {
    "greedy, target": [(GREEDY, 0.0)],
    "greedy, guided": [(GREEDY, 1.0)],
    "sampled, target": [(SAMPLED, 0.0)],
    "sampled, guided": [(SAMPLED, 1.0)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write_target(tmp_path_factory.mktemp("pieces"), tokenizer("pieces"))


@pytest.fixture(scope="module")
def other_engines(folder: Path, trio_engines: Mapping[Role, Engine]) -> Mapping[Role, Engine]:
    return families.engines(families.with_target(folder), trio_engines)


async def test_answers_are_instances_of_their_schemas(trio_engines: Mapping[Role, Engine]) -> None:
    await check(trio_config(**SERVICE), trio_engines, schemas(FEW), ALL_WAYS)


async def test_answers_of_another_family_are_instances_of_their_schemas(
    folder: Path, other_engines: Mapping[Role, Engine]
) -> None:
    await check(families.with_target(folder, **SERVICE), other_engines, schemas(FEW), ALL_WAYS)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, LONG, BATCH))
@pytest.mark.parametrize("way", WAYS)
async def test_many_answers_are_instances_of_their_schemas(
    trio_engines: Mapping[Role, Engine], way: str, first: int
) -> None:
    await check(trio_config(**SERVICE), trio_engines, schemas(LONG)[first : first + BATCH], WAYS[way])


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, LONG, BATCH))
@pytest.mark.parametrize("way", WAYS)
async def test_many_answers_of_another_family_are_instances_of_their_schemas(
    folder: Path, other_engines: Mapping[Role, Engine], way: str, first: int
) -> None:
    await check(families.with_target(folder, **SERVICE), other_engines, schemas(LONG)[first : first + BATCH], WAYS[way])
