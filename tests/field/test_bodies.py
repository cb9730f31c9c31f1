"""Bodies and headers as other people's clients send them: `bodies.jsonl`, one request a line.

about: the claim. path: by default that of chats. fields: merged into a minimal request; raw, latin: the body itself, in
UTF-8 or in Latin-1. headers: in place of JSON's Content-Type. encoding: the Content-Encoding; packed: what the body
really is, if not that. status, and of an error its param and what its message names.
"""

from __future__ import annotations

import gzip
import json
import time
import zlib
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.scripted_service import ScriptedBackend, client

CHAT = "/v1/chat/completions"
ROWS = [json.loads(line) for line in Path(__file__).with_name("bodies.jsonl").read_text(encoding="utf-8").splitlines()]
MINIMAL: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi"},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1]},
}
BIG = "x" * 1_000_000
MOST = 3_000  # bytes of an error


def content(row: dict[str, Any]) -> bytes:
    """The body before any encoding."""
    if "raw" in row:
        return str(row["raw"]).encode()
    if "latin" in row:
        return str(row["latin"]).encode("latin-1")
    minimal = MINIMAL[row.get("path", CHAT).rstrip("/")]
    merged = {name: value for name, value in (minimal | row["fields"]).items() if name != "messages" or value}
    return json.dumps(merged).encode()


def packed(row: dict[str, Any], body: bytes) -> bytes:
    """The body in the encoding that the row sends."""
    encoding = row.get("encoding", "").lower().removeprefix("identity").strip(" ,").removeprefix("x-")
    how = row.get("packed", encoding)
    if how == "bomb":
        body = b" " * 10_000_000 + body
    if how == "raw":
        stream = zlib.compressobj(wbits=-15)
        return stream.compress(body) + stream.flush()
    if how in ("", "none"):
        return body
    whole = gzip.compress(body) if encoding == "gzip" else zlib.compress(body)
    return {"cut": whole[:-9], "twice": whole * 2}.get(how, whole)


async def send(row: dict[str, Any]) -> httpx.Response:
    headers = dict(row.get("headers", {"Content-Type": "application/json"}))
    if "encoding" in row:
        headers["Content-Encoding"] = row["encoding"]
    async with client(ScriptedBackend()) as http:
        return await http.post(row.get("path", CHAT), content=packed(row, content(row)), headers=headers)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["about"])
async def test_a_request_is_served_or_refused_by_name(row: dict[str, Any]) -> None:
    response = await send(row)
    assert response.status_code == row["status"], response.text
    if row["status"] == 200:
        return
    error = response.json()["error"]
    assert [word for word in row["names"] if word not in error["message"]] == [], error["message"]
    assert error["param"] == row.get("param", error["param"])
    assert len(response.content) < MOST


def test_each_line_makes_a_claim_of_its_own() -> None:
    claims = [row["about"] for row in ROWS]
    assert len(claims) == len(set(claims))
    assert all(row["status"] == 200 or row["names"] for row in ROWS)


@pytest.mark.parametrize(
    "fields",
    [
        {BIG: 1},
        {"model": BIG},
        {"logit_bias": {BIG: 1}},
        {"guidance": {BIG: 1}},
        {"guidance": {"guide": BIG}},
        {"thinking": {BIG: BIG}},
        {"stream_options": {BIG: True}},
        {"messages": [{"role": "user", "content": [{"type": BIG}]}]},
        {"messages": [{"role": "user", "content": {BIG: BIG}}]},
        {"reasoning_effort": BIG},
        {"chat_template_kwargs": {"messages": BIG}},
        {"user": [BIG]},
        {"stop": {BIG: 1}},
        {"max_tokens": BIG},
        {"seed": 10**4_000},
        {"min_tokens": 10**4_000},
        {"temperature": 10**4_000},
        {"stop_token_ids": [10**4_000]},
        {"logit_bias": {"9" * 4_000: 1}},
    ],
    ids=lambda fields: json.dumps(fields)[:40],
)
async def test_an_error_repeats_little_of_a_request(fields: dict[str, Any]) -> None:
    response = await send({"fields": fields})
    assert response.status_code in (400, 404), response.text[:500]
    assert len(response.content) < MOST
    assert sum(len(name) + len(value) for name, value in response.headers.raw) < MOST


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"messages": [1] * 100_000}, "messages.0"),
        ({"messages": [{"role": "user", "content": [1] * 100_000}]}, "messages.0.content.0"),
        ({"logit_bias": {str(id_): "x" for id_ in range(100_000)}}, "logit_bias"),
        ({"metadata": {"k" * 100_000: ["\U0001f600", *[0] * 100_000]}, "n": 0}, "n"),
        ({"metadata": {"k" * 100_000: [*[0] * 100_000, "\ud83d"]}}, None),
    ],
    ids=["messages", "parts", "biases", "a whole character", "half of a character"],
)
async def test_faults_of_a_long_body_are_found_in_linear_time_and_memory(
    fields: dict[str, Any], named: str | None
) -> None:
    began = time.process_time()
    response = await send({"fields": fields})
    assert time.process_time() - began < 10  # about one second; squared it would be minutes, or 10 GB
    assert response.status_code == 400
    assert named in (None, response.json()["error"]["param"])


async def test_a_long_address_is_repeated_in_part(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "router.request_log")
    async with client(ScriptedBackend()) as http:
        for path in (f"/v1/models/{BIG[:60_000]}", f"/{BIG[:60_000]}"):
            response = await http.get(path)
            assert response.status_code == 404
            assert len(response.content) < MOST
    assert [len(line) < MOST for line in caplog.messages] == [True, True]


@pytest.mark.parametrize("given", [b"a b", "Zo\u00eb".encode(), b"\xff\x85\xfe", b"x" * 9_000, b'"{}"'])
async def test_a_request_id_is_the_same_in_header_body_and_log(given: bytes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "router.request_log")
    async with client(ScriptedBackend()) as http:
        response = await http.post(CHAT, json={"a": 1}, headers=[(b"X-Request-Id", given)])
    (header,) = (value for name, value in response.headers.raw if name.lower() == b"x-request-id")
    text = response.json()["error"]["request_id"]
    assert header == given[:256]
    assert text in (given[:256].decode("latin-1"), given[:256].decode("utf-8", "replace"))
    (line,) = caplog.messages
    assert line.isascii()
    assert json.loads(line)["request_id"] == text


async def test_no_model_means_the_guided_one() -> None:
    backend = ScriptedBackend()
    async with client(backend) as http:
        answer = await http.post("/v1/completions", json={"prompt": "Hi"})
    assert answer.json()["model"] == "duo"
    assert not backend.requests[0].guidance.never_guides()


async def test_the_newer_of_two_lengths_counts() -> None:
    backend = ScriptedBackend()
    async with client(backend) as http:
        await http.post(CHAT, json=MINIMAL[CHAT] | {"max_tokens": 90, "max_completion_tokens": 5})
    assert backend.requests[0].sampling.max_tokens == 5


async def test_no_reasoning_effort_opens_no_thinking() -> None:
    backend = ScriptedBackend()
    async with client(backend) as http:
        for more in ({"reasoning_effort": "none"}, {"reasoning_effort": "none", "thinking": {"start": "<t>"}}):
            await http.post(CHAT, json=MINIMAL[CHAT] | more)
    assert [request.thinking.start for request in backend.requests] == ["", "<t>"]


async def test_declined_tools_change_no_prompt() -> None:
    backend = ScriptedBackend()
    tools = [{"type": "function", "function": {"name": "f"}}]
    async with client(backend) as http:
        for more in ({}, {"tools": tools, "tool_choice": "none"}):
            assert (await http.post(CHAT, json=MINIMAL[CHAT] | more)).status_code == 200
    assert backend.requests[0].prompts == backend.requests[1].prompts


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_answers_have_vllms_keys_null_unless_asked_for(path: str) -> None:
    async with client(ScriptedBackend()) as http:
        plain = (await http.post(path, json=MINIMAL[path])).json()
        asked = (await http.post(path, json=MINIMAL[path] | {"return_token_ids": True, "prompt_logprobs": 0})).json()
    chat = path == CHAT
    for key in ("service_tier", "system_fingerprint", "kv_transfer_params"):
        assert (plain[key], asked[key]) == (None, None)
    for key in ("prompt_logprobs", "prompt_token_ids"):
        holder = [answer if chat else answer["choices"][0] for answer in (plain, asked)]
        assert holder[0][key] is None
        assert holder[1][key]
    assert plain["choices"][0]["token_ids"] is None
    assert asked["choices"][0]["token_ids"]
    if chat:
        message = plain["choices"][0]["message"]
        assert [message[key] for key in ("refusal", "annotations", "audio", "function_call")] == [None] * 4


async def test_a_model_has_vllms_card() -> None:
    async with client(ScriptedBackend()) as http:
        listed = (await http.get("/v1/models")).json()["data"]
        assert [(await http.get(f"/v1/models/{card['id']}")).json() for card in listed] == listed
        assert (await http.get("/v1/models/duo%2Ftarget/")).json() == listed[1]
    for card in listed:
        assert (card["root"], card["parent"], card["object"]) == (card["id"], None, "model")
        (permission,) = card["permission"]
        assert permission["allow_sampling"] is True
        assert permission["object"] == "model_permission"
