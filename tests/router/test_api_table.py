"""Each row of the tables in docs/api.md, compared with the application."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from router.addresses import NOT_OFFERED
from router.schema import IGNORED, NOT_SERVED, ChatRequest, CompletionRequest
from tests.support.scripted_service import ScriptedBackend, client, config

PAGE = Path(__file__).parent.parent.parent / "docs" / "api.md"
ROW = re.compile(r"\| `(\w+)` \| (both|chat|completions) \| (supported|same|refused) \| `(\{.*\})` \| ?(.*?) ?\|")
ADDRESSES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"model": "duo", "messages": [{"role": "user", "content": "Hi"}]}),
    "completions": ("/v1/completions", {"model": "duo", "prompt": "Hi"}),
}
OWN_FIELDS = {"guidance", "thinking", "speculation", "stop_on_repeat"}
NOT_VLLM_FIELDS = {  # also refused, but fields of OpenAI or of older versions of vLLM
    *("best_of", "functions", "function_call", "modalities", "audio", "moderation", "verbosity", "web_search_options"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
}


@dataclass(frozen=True)
class TableRow:
    """One row of a table, for one address."""

    field: str
    address: str
    status: str
    example: dict[str, Any]
    note: str


def rows() -> list[TableRow]:
    found = []
    for table in PAGE.read_text(encoding="utf-8").split("| field | where |")[1:]:
        for line in table.split("\n\n")[0].splitlines()[2:]:
            match = ROW.fullmatch(line)
            assert match is not None, line
            field, where, status, example, note = match.groups()
            for address in ADDRESSES if where == "both" else (where,):
                found.append(TableRow(field, address, status, json.loads(example), note))
    return found


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row.address}-{row.field}")
async def test_a_field_has_the_status_of_its_row(row: TableRow) -> None:
    path, body = ADDRESSES[row.address]
    assert row.field in row.example
    async with client(ScriptedBackend()) as http:
        response = await http.post(path, json=body | row.example)
    if row.status == "refused":
        assert (response.status_code, response.json()["error"]["param"]) == (400, row.field)
    else:
        assert response.status_code == 200, response.text


def test_every_field_has_one_row() -> None:
    stated = [(row.field, row.address) for row in rows()]
    assert len(stated) == len(set(stated))
    for address, kind in (("chat", ChatRequest), ("completions", CompletionRequest)):
        served = {row.field for row in rows() if row.address == address and row.status != "refused"}
        assert served == kind.model_fields.keys() - OWN_FIELDS
    refused = {row.field for row in rows() if row.status == "refused"}
    assert refused == NOT_SERVED.keys() - NOT_VLLM_FIELDS


def test_a_row_with_a_difference_has_a_note() -> None:
    assert all(row.note for row in rows() if row.status == "same")


def test_the_page_lists_the_default_efforts() -> None:
    table = PAGE.read_text(encoding="utf-8").split("### Effort")[1].split("\n\n")[2]
    found = [re.findall(r"[^|`]+", line.replace(" ", "")) for line in table.splitlines()[2:]]
    limits = {"nothinking": 0, "asconfigured": None}
    stated = [(name, limits.get(limit, limit.replace(",", ""))) for name, limit, _ in found]
    efforts = {name: effort.thinking_tokens for name, effort in config().efforts.items()}
    assert [(name, str(limit)) for name, limit in stated] == [(name, str(limit)) for name, limit in efforts.items()]


def test_the_page_lists_the_other_fields() -> None:
    paragraph = PAGE.read_text(encoding="utf-8").split("Of OpenAI's own fields")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", paragraph)) == {*IGNORED, *OWN_FIELDS}
    refused = PAGE.read_text(encoding="utf-8").split("Refused, unless they ask for nothing:")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", refused)) - {"medium"} == NOT_VLLM_FIELDS


def other_addresses() -> dict[str, str]:
    """The table of addresses that are not offered: what to use instead, by address."""
    table = PAGE.read_text(encoding="utf-8").split("| address | instead |\n|---|---|\n")[1].split("\n\n")[0]
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return {address: instead for addresses, instead in cells for address in re.findall(r"`(\S+)`", addresses)}


def test_the_page_lists_the_addresses_that_are_not_offered() -> None:
    assert other_addresses() == NOT_OFFERED


@pytest.mark.parametrize("address", other_addresses())
async def test_an_address_that_is_not_offered_says_what_to_use(address: str) -> None:
    async with client(ScriptedBackend()) as http:
        for path in (address, f"{address}/", f"{address}/some-id/cancel"):
            for method in ("GET", "POST"):
                response = await http.request(method, path, json={})
                assert response.status_code == 404, path
                instead = next(NOT_OFFERED[a] for a in sorted(NOT_OFFERED, reverse=True) if path.startswith(a))
                assert response.json()["error"]["message"].endswith(f"; {instead}")


async def test_advice_names_addresses_that_exist() -> None:
    async with client(ScriptedBackend()) as http:
        described = (await http.get("/openapi.json")).json()["paths"]
    offered = {(method.upper(), path) for path, item in described.items() for method in item}
    offered |= {("GET", "/metrics"), ("GET", "/openapi.json")}  # of no client of the API
    named = {pair for instead in NOT_OFFERED.values() for pair in re.findall(r"(GET|POST) (/[\w/.]+)", instead)}
    assert named
    assert named <= offered
