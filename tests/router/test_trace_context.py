"""A client's trace is read from its `traceparent` header, and named in the logs."""

from __future__ import annotations

import json

import pytest

from router.backend import Unavailable
from router.failover import FailoverBackend
from router.trace_context import read_trace_id
from tests.support.scripted_service import ScriptedBackend, client, config

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
VALID = f"00-{TRACE}-{PARENT}-01"


def read(*values: str) -> str:
    return read_trace_id({"headers": [(b"Traceparent", value.encode("latin-1")) for value in values]})


@pytest.mark.parametrize(
    "value", [VALID, f"00-{TRACE}-{PARENT}-00", f" {VALID} ", f"cc-{TRACE}-{PARENT}-ff", f"01-{VALID[3:]}-more"]
)
def test_the_trace_id_is_read(value: str) -> None:
    assert read(value) == TRACE


@pytest.mark.parametrize(
    "value",
    [
        "",
        TRACE,
        VALID[:-1],
        VALID + "0",
        VALID + "-more",  # version 00 has four fields
        VALID.upper(),
        f"ff-{VALID[3:]}",
        f"01-{VALID[3:]}more",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{PARENT}-0g",
        f"00_{TRACE}_{PARENT}_01",
        "\xff" * 55,
        "0" * 10_000,
    ],
)
def test_an_invalid_header_is_no_trace(value: str) -> None:
    assert read(value) == ""


def test_two_headers_or_none_are_no_trace() -> None:
    assert read() == read(VALID, VALID) == ""


@pytest.mark.parametrize(("value", "logged"), [(VALID, TRACE), ("00-bad", None)])
async def test_the_trace_is_in_the_request_log_and_in_every_sequence(
    value: str, logged: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "router.request_log")
    backend = ScriptedBackend()
    async with client(backend) as http:
        answer = await http.post("/v1/completions", json={"prompt": "Hi", "n": 2}, headers={"traceparent": value})
        refused = await http.post("/v1/completions", json={"n": 0}, headers={"traceparent": value})
    assert (answer.status_code, refused.status_code) == (200, 400)
    assert [json.loads(line).get("trace_id") for line in caplog.messages] == [logged] * 2
    assert [request.trace_id for request in backend.requests] == [logged or ""] * 2


async def test_the_loss_of_a_coordinator_is_logged_with_the_trace(caplog: pytest.LogCaptureFixture) -> None:
    coordinators = ScriptedBackend()
    coordinators.fail = Unavailable("its coordinator was lost")
    coordinators.ending = _ending  # type: ignore[attr-defined]
    backend = FailoverBackend(coordinators, config().deadlines)  # type: ignore[arg-type]
    async with client(backend) as http:  # type: ignore[arg-type]
        headers = {"traceparent": VALID, "X-Request-Id": "mine"}
        await http.post("/v1/completions", json={"prompt": "Hi", "priority": -3}, headers=headers)
    assert len(coordinators.requests) > 1
    assert {request.priority for request in coordinators.requests} == {-3}  # the next coordinator gets it too
    assert any(f"(trace {TRACE}): its coordinator was lost" in message for message in caplog.messages)


async def _ending() -> bool:
    return True
