import asyncio

import pytest

from actors.api.generation import CoordinatorEvent, Delta, Finished, TokenNote, Usage
from actors.coordinator.output import COALESCE_S, MESSAGES_PER_S, MOST_S, EventQueue, coalesce_s

END = Finished("stop", Usage(1, 2, 0, 0, 0, 0, 0.0))


class Clock:
    """A clock that a test moves by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def token(number: int) -> Delta:
    return Delta(content=f" {number}", tokens=[number], notes=[TokenNote(number, f" {number}", 1.0, False)])


def ids(events: list[CoordinatorEvent]) -> list[int]:
    return [id_ for event in events if isinstance(event, Delta) for id_ in event.tokens]


async def at_once(events: EventQueue, streams: int = 1) -> list[CoordinatorEvent]:
    """Return a batch that must not wait for time to pass."""
    async with asyncio.timeout(COALESCE_S / 5):
        return await events.batch(streams)


async def test_the_first_token_is_sent_at_once_and_the_next_ones_are_not() -> None:
    events = EventQueue(Clock())
    events.emit(token(0))
    assert ids(await at_once(events)) == [0]
    events.emit(token(1))
    with pytest.raises(TimeoutError):
        await at_once(events)


async def test_tokens_within_the_interval_are_one_message() -> None:
    clock = Clock()
    events = EventQueue(clock)
    events.emit(token(0))
    await at_once(events)
    for number in range(1, 6):
        events.emit(token(number))
    clock.now += COALESCE_S
    (joined,) = await at_once(events)
    assert joined == Delta(
        content=" 1 2 3 4 5", tokens=[1, 2, 3, 4, 5], notes=[TokenNote(n, f" {n}", 1.0, False) for n in range(1, 6)]
    )


async def test_a_longer_interval_gives_fewer_messages_but_no_later_end() -> None:
    clock = Clock()
    events = EventQueue(clock)
    events.emit(token(0))
    await events.batch(interval_s=30.0)
    events.emit(token(1))
    clock.now += 20  # beyond what any number of streams asks for
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(COALESCE_S / 5):
            await events.batch(interval_s=30.0)
    events.emit(END)
    async with asyncio.timeout(COALESCE_S / 5):
        last = await events.batch(interval_s=30.0)
    assert ids(last) == [1]
    assert last[-1] == END


async def test_the_end_is_sent_at_once_with_all_that_is_left() -> None:
    events = EventQueue(Clock())
    events.emit(token(0))
    await at_once(events)
    waiting = asyncio.create_task(events.batch(10_000))
    events.emit(token(1))
    await asyncio.sleep(0)
    events.emit(token(2))
    events.emit(END)
    async with asyncio.timeout(COALESCE_S):
        last = await waiting
    assert ids(last) == [1, 2]
    assert last[-1] == END


async def test_many_streams_widen_the_interval() -> None:
    clock = Clock()
    events = EventQueue(clock)
    events.emit(token(0))
    await at_once(events, 256)
    events.emit(token(1))
    clock.now += COALESCE_S
    with pytest.raises(TimeoutError):
        await at_once(events, 256)
    clock.now += coalesce_s(256) - COALESCE_S
    assert ids(await at_once(events, 256)) == [1]


async def test_a_cancelled_wait_loses_and_reorders_no_token() -> None:
    clock = Clock()
    events, received = EventQueue(clock), list[CoordinatorEvent]()
    for number in range(40):
        events.emit(token(number))
        waiting = asyncio.create_task(events.batch())
        await asyncio.sleep(0)
        waiting.cancel()
        if number % 3 == 0:
            clock.now += COALESCE_S
            await asyncio.gather(waiting, return_exceptions=True)
            received += waiting.result() if not waiting.cancelled() else await at_once(events)
        else:
            done = (await asyncio.gather(waiting, return_exceptions=True))[0]
            received += done if isinstance(done, list) else []
    events.emit(END)
    received += await at_once(events)
    assert ids(received) == [*range(40)]


def test_the_interval_is_the_shortest_for_few_and_bounded_for_many() -> None:
    assert coalesce_s(1) == COALESCE_S
    assert coalesce_s(128) == 128 / MESSAGES_PER_S
    assert coalesce_s(100_000) == MOST_S
