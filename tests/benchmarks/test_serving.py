"""The serving benchmark: answers as the client records them, the bare application's, and the ratio of the two."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount

from benchmarks.bare_application import NAME, Answers, Player, create_bare_app
from benchmarks.serving import Measured, measure, tables
from benchmarks.sse_client import Stream, read_streams
from router.api import create_app
from tests.support.scripted_service import ScriptedBackend, config, sent_messages, serving, tokenizers

BODY = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "stream_options": {"include_usage": True}}


async def played(app: FastAPI, seed: int, pace: str) -> list[bytes]:
    """The messages of the bare application for a request."""
    return await sent_messages(app, f"/{pace}/v1/chat/completions", BODY | {"seed": seed})


@pytest.mark.parametrize("pace", ["paced", "unpaced"])
async def test_the_bare_application_sends_each_recorded_chunk_by_itself(pace: str) -> None:
    app = create_bare_app({0: (b"data: a\n\n", b"data: b\n\ndata: [DONE]\n\n"), 1: (b"data: c\n\n",)})
    assert await played(app, 0, pace) == [b"data: a\n\n", b"data: b\n\ndata: [DONE]\n\n"]
    assert await played(app, 1, pace) == [b"data: c\n\n"]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses of the bare application, which only begin; the service's are 1,000 s times the number of streams."""
    begun: list[float] = []

    async def sleep(seconds: float) -> None:
        begun.append(seconds)

    monkeypatch.setattr("benchmarks.bare_application.asyncio.sleep", sleep)
    monkeypatch.setattr("benchmarks.bare_application.coalesce_s", lambda streams: 1_000.0 * streams)
    return begun


async def test_a_paced_stream_pauses_before_all_but_its_first_and_last_chunk(pauses: list[float]) -> None:
    await played(create_bare_app({0: [b"data: a\n\n"] * 5}), 0, "paced")
    assert pauses == [pytest.approx(1_000, abs=60)] * 3


async def test_the_pace_is_that_of_the_service_for_the_open_streams(pauses: list[float]) -> None:
    player = Player()
    streams = [player.play([b"data: a\n\n"] * 9, paced=True) for _ in range(32)]
    for stream in streams:
        await anext(stream)
    assert pauses == []
    await anext(streams[0])
    assert pauses == [pytest.approx(32_000, abs=60)]
    for _ in range(8):
        assert await anext(streams[0], b"") is not None
    await anext(streams[1])
    assert pauses[-1] == pytest.approx(31_000, abs=60)


async def test_an_unpaced_stream_does_not_pause(pauses: list[float]) -> None:
    await played(create_bare_app({0: [b"data: a\n\n"] * 5}), 0, "unpaced")
    assert len(pauses) == 3
    assert max(pauses) <= 0


async def test_a_replayed_answer_has_the_chunks_and_tokens_of_the_service() -> None:
    backend = ScriptedBackend(thought="Let us see", text="It is Eve .")
    bodies = [BODY | {"seed": seed, "guidance": {"explain": True}} for seed in range(3)]
    async with serving(create_app(config(), tokenizers(), backend)) as url:
        answers = await read_streams(url, bodies)
    assert [answer.tokens for answer in answers] == [7, 7, 7]
    assert all(answer.chunks[-1].endswith(b"data: [DONE]\n\n") for answer in answers)
    assert all(chunk.endswith(b"\n\n") for answer in answers for chunk in answer.chunks)
    async with serving(create_bare_app({seed: answer.chunks for seed, answer in enumerate(answers)})) as url:
        replayed = await read_streams(f"{url}/paced", bodies)
    assert [(each.chunks, each.tokens, each.messages) for each in replayed] == [
        (each.chunks, each.tokens, each.messages) for each in answers
    ]


async def test_each_round_replays_the_answers_of_the_service() -> None:
    answers: dict[int, Sequence[bytes]] = {}
    loaded: list[Answers] = []
    done: list[None] = []

    def load(recorded: Answers) -> None:
        answers.update(recorded)
        loaded.append(recorded)

    service = create_app(config(), tokenizers(), ScriptedBackend())
    app = Starlette(routes=[Mount(f"/{NAME}", create_bare_app(answers)), Mount("/", service)])
    async with serving(app) as url:
        measuring = partial(measure, url, load, "duo", [1, 3], 8, 2, 1.0, lambda: done.append(None))
        results = await asyncio.to_thread(measuring)
    assert [sorted(recorded) for recorded in loaded] == [[0], [0, 1, 2], [0], [0, 1, 2], [0], [0, 1, 2]]
    assert len(done) == 4
    for measured, streams in zip(results, [1, 3], strict=True):
        assert [len(each.answers) for each in (measured.service, measured.bare, measured.unpaced)] == [2 * streams] * 3
        assert measured.bare.tokens == measured.unpaced.tokens == measured.service.tokens == 2 * 4 * streams


def stream(asked: float, last: float, tokens: int) -> Stream:
    return Stream(asked, asked + 0.5, last, tokens, 4)


def test_over_bare_is_the_ratio_of_tokens_a_second() -> None:
    measured = Measured(2)
    for asked in (0.0, 100.0):
        measured.service.add([stream(asked, asked + 2, 30), stream(asked, asked + 4, 30)], {"Router": 0.003})
        measured.bare.add([stream(asked, asked + 1, 30), stream(asked, asked + 2, 30)], {"Bare": 0.0006})
        measured.unpaced.add([stream(asked, asked + 1, 30), stream(asked, asked + 1, 30)], {})
    result = measured.result()
    assert (result["tokens_per_s"], result["bare_tokens_per_s"], result["over_bare"]) == (15, 30, 0.5)
    assert result["bare_unpaced_tokens_per_s"] == 60
    assert measured.details() == {
        "streams": 2,
        "messages_per_answer": 4.0,
        "cpu_us_per_token": {"Router": 50},
        "bare_cpu_us_per_token": {"Bare": 10},
    }
    assert [table.row_count for table in tables([measured])] == [7, 1, 1]
