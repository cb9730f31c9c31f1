"""Server-sent events as the application hands them to the server, message by message."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from actors.metrics import Recorder
from router.api import create_app
from tests.support.deadlines import HANG_S
from tests.support.scripted_service import ScriptedBackend, config, sent_messages, tokenizers

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
EVERYTHING = {"guidance": {"explain": True}, "return_token_ids": True, "logprobs": True, "top_logprobs": 2}
USAGE = {"include_usage": True}


async def streamed(
    body: dict[str, Any],
    path: str = "chat/completions",
    backend: ScriptedBackend | None = None,
    received: Callable[[bytes], object] = lambda message: None,
    recorder: Recorder | None = None,
) -> list[bytes]:
    """The messages of a streamed answer."""
    backend = backend or ScriptedBackend(thought="Let us see", text="It is Ève .")
    app = create_app(config(), tokenizers(), backend, recorder)
    return await sent_messages(app, f"/v1/{path}", body | {"stream": True, "seed": 1}, received)


def events(message: bytes) -> list[str]:
    """The data of each event of a message."""
    *lines, rest = message.decode().split("\n\n")
    assert rest == ""
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


@pytest.mark.parametrize("choices", [1, 3])
async def test_the_counts_and_the_end_come_with_the_finish_reason(choices: int) -> None:
    *earlier, last = await streamed(CHAT | {"n": choices, "stream_options": USAGE})
    *chunks, usage, done = events(last)
    assert done == "[DONE]"
    assert json.loads(usage)["usage"]["completion_tokens"] == 7 * choices
    ends = [choice["finish_reason"] for chunk in chunks for choice in json.loads(chunk)["choices"]]
    assert ends.count("stop") >= 1
    assert not any(b"[DONE]" in message or b'"usage"' in message for message in earlier)


async def test_a_stream_without_counts_ends_with_its_finish_reason() -> None:
    *_, last = await streamed(CHAT)
    *chunks, done = events(last)
    assert (json.loads(chunks[-1])["choices"][0]["finish_reason"], done) == ("stop", "[DONE]")


async def test_the_first_token_is_sent_before_the_second_exists() -> None:
    backend = ScriptedBackend(text="It is Eve .")
    proceed = backend.proceed = asyncio.Event()
    async with asyncio.timeout(HANG_S):
        first, *others = await streamed(CHAT, backend=backend, received=lambda message: proceed.set())
    assert [json.loads(text)["choices"][0]["delta"]["content"] for text in events(first)] == ["It"]
    assert len(others) == 1


async def test_a_client_that_leaves_at_the_end_has_its_whole_answer() -> None:
    recorder = Recorder()
    await streamed(CHAT, received=lambda message: b"[DONE]" in message, recorder=recorder)
    statuses = [labels[-1] for metric, labels, _ in recorder if metric.name == "thinklogit_requests"]
    assert statuses == ["200"]


async def test_messages_after_the_first_call_nothing_of_pydantic() -> None:
    called: list[str] = []
    backend = ScriptedBackend(thought="Let us see", text="It is Eve .")
    proceed = backend.proceed = asyncio.Event()

    def watch(frame: FrameType, event: str, called_c: Any) -> None:
        module = frame.f_globals.get("__name__", "")
        if event == "c_call":
            module = called_c.__module__ or type(called_c.__self__).__module__
        if str(module).startswith("pydantic"):
            called.append(f"{module}: {frame.f_code.co_qualname}")

    def received(message: bytes) -> None:
        proceed.set()
        sys.setprofile(None if b"[DONE]" in message else watch)

    try:
        async with asyncio.timeout(HANG_S):
            sent = await streamed(CHAT | EVERYTHING | {"stream_options": USAGE}, backend=backend, received=received)
    finally:
        sys.setprofile(None)
    assert len(sent) > 1
    assert called == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", CHAT),
        ("chat/completions", CHAT | {"stream_options": USAGE}),
        ("chat/completions", CHAT | {"stream_options": USAGE | {"continuous_usage_stats": True}}),
        ("chat/completions", CHAT | EVERYTHING | {"n": 2}),
        ("completions", {"prompt": "Ève", "echo": True}),
        ("completions", {"prompt": "Ève", "echo": True, "logprobs": 2, "return_token_ids": True}),
    ],
)
async def test_every_event_is_compact_json_in_utf8(path: str, body: dict[str, Any]) -> None:
    texts = [text for message in await streamed(body, path) for text in events(message)]
    assert texts.pop() == "[DONE]"
    assert any("È" in text for text in texts)
    assert texts == [json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":")) for text in texts]
