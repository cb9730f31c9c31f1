import asyncio
from collections.abc import AsyncIterator, MutableMapping
from itertools import pairwise
from typing import Any

import pytest

from actors.api.generation import Delta, Event, Finished, Generate, Rejected
from router.backend import ApiError, Overloaded, Status
from router.request_planning import plan_chat
from router.schema import ChatRequest, parse
from router.streams import Batch, ClientGone, Generations, while_connected
from tests.support.scripted_service import ScriptedBackend, config, tokenizers, usage

NEVER_S = 3600.0  # an interval longer than any test


def sequences(n: int) -> list[Generate]:
    body = {"model": "duo", "messages": [{"role": "user", "content": "Hi"}], "n": n}
    return plan_chat(parse(ChatRequest, body), config(), tokenizers(), "r").sequences


async def gathered(generations: Generations) -> list[Batch]:
    return [batch async for batch in generations.batches()]


async def test_the_first_event_is_sent_at_once_and_the_rest_together() -> None:
    backend = ScriptedBackend(text="It is Eve .")
    backend.proceed = asyncio.Event()
    async with Generations(backend, sequences(1), NEVER_S) as generations:
        batches = generations.batches()
        assert (await anext(batches)).deltas[0].content == "It"
        backend.proceed.set()
        rest = [batch async for batch in batches]  # the end cuts the interval short
    assert len(rest) == 1
    assert rest[0].deltas[0] == Delta(content=" is Eve .", tokens=[1, 2, 3])
    assert rest[0].finished[0].reason == "stop"


async def test_a_burst_within_the_interval_is_one_batch() -> None:
    async with Generations(ScriptedBackend(), sequences(3), NEVER_S) as generations:
        batches = await gathered(generations)
    assert len(batches) <= 2
    assert {choice for batch in batches for choice in batch.finished} == {0, 1, 2}


class Trickle:
    """A backend whose tokens come in bursts of 1, 2, 3 and so on."""

    async def generate(self, request: Generate) -> AsyncIterator[Event]:
        token = 0
        for burst in range(1, 8):
            for _ in range(burst):
                yield Delta(content=f"{token} ", tokens=[token])
                token += 1
            await asyncio.sleep(0.002 * (burst % 3))
        yield Finished("stop", usage(request, token))

    async def status(self) -> Status:
        return Status()


@pytest.mark.parametrize("interval_s", [0.0, 0.001, 0.005, NEVER_S])
async def test_no_event_is_lost_or_moved_at_any_interval(interval_s: float) -> None:
    async with Generations(Trickle(), sequences(2), interval_s) as generations:
        batches = await gathered(generations)
    for choice in range(2):
        deltas = [batch.deltas[choice] for batch in batches if choice in batch.deltas]
        assert [token for delta in deltas for token in delta.tokens] == [*range(28)]
        assert "".join(delta.content for delta in deltas) == "".join(f"{token} " for token in range(28))
        assert sum(choice in batch.finished for batch in batches) == 1


async def test_batches_before_the_end_are_an_interval_apart() -> None:
    interval_s = 0.005
    times = []
    async with Generations(Trickle(), sequences(2), interval_s) as generations:
        async for _ in generations.batches():
            times.append(asyncio.get_running_loop().time())
    assert all(later - earlier > 0.99 * interval_s for earlier, later in pairwise(times[:-1]))


async def test_leaving_early_cancels_every_sequence() -> None:
    backend = ScriptedBackend()
    backend.proceed = asyncio.Event()
    generated = sequences(3)
    async with Generations(backend, generated) as generations:
        await anext(generations.batches())
    assert sorted(backend.cancelled) == sorted(sequence.request_id for sequence in generated)


async def test_one_failure_ends_all_after_the_earlier_events() -> None:
    backend = ScriptedBackend()
    backend.fail = ApiError("the model is gone")
    async with Generations(backend, sequences(2), 0.0) as generations:
        batches = generations.batches()
        assert (await anext(batches)).deltas[0].content == "It"
        with pytest.raises(ApiError, match="the model is gone"):
            await anext(batches)


class ScriptedEvents:
    """A backend that yields the given events."""

    def __init__(self, *events: Event) -> None:
        self.events = events

    async def generate(self, request: Generate) -> AsyncIterator[Event]:
        for event in self.events:
            yield event

    async def status(self) -> Status:
        return Status()


async def failure(*events: Event) -> ApiError:
    async with Generations(ScriptedEvents(*events), sequences(1)) as generations:
        with pytest.raises(ApiError) as caught:
            await gathered(generations)
    return caught.value


async def test_every_abnormal_end_is_an_error() -> None:
    counts = usage(sequences(1)[0], 1)
    assert "without saying why" in (await failure(Delta(content="a"))).message
    assert (await failure(Finished("error", counts, None, "no memory"))).message == "no memory"
    error = await failure(Rejected("overloaded", "too many", 1.2))
    assert isinstance(error, Overloaded)
    assert error.headers == {"Retry-After": "2"}


class Work:
    """Work that never ends by itself."""

    def __init__(self) -> None:
        self.started, self.cancelled = asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        self.started.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()


async def test_a_disconnect_cancels_the_work() -> None:
    work = Work()

    async def receive() -> MutableMapping[str, Any]:
        await work.started.wait()
        return {"type": "http.disconnect"}

    with pytest.raises(ClientGone):
        await while_connected(receive, work.run())
    assert work.cancelled.is_set()


async def test_cancelling_the_request_cancels_the_work() -> None:
    work = Work()

    async def receive() -> MutableMapping[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    serving = asyncio.create_task(while_connected(receive, work.run()))
    await work.started.wait()
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert work.cancelled.is_set()
