"""What one consumer has still to hear of its answer, coalesced by time and by how many listen."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from actors.api.generation import CoordinatorEvent, Delta

COALESCE_S = 0.05  # a stream's messages are at least this far apart, but for the first and the last
MESSAGES_PER_S = 500  # of one coordinator: a message costs about a millisecond on its way through router and proxy
MOST_S = 0.5  # what a reader still takes for a flow


def coalesce_s(streams: int) -> float:
    """Seconds between two messages of a stream when so many are open: wider once all together would be too many."""
    return min(max(COALESCE_S, streams / MESSAGES_PER_S), MOST_S)


class EventQueue:
    """A queue for one reader whose neighbouring deltas are joined."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._events: list[CoordinatorEvent] = []
        self._news = asyncio.Event()
        self._urgent = asyncio.Event()  # the end is among them
        self._sent = float("-inf")  # when the last batch went out

    def emit(self, event: CoordinatorEvent) -> None:
        """Add an event; anything but a delta is the last one."""
        self._events.append(event)
        self._news.set()
        if not isinstance(event, Delta):
            self._urgent.set()

    async def batch(self, streams: int = 1, interval_s: float = 0.0) -> list[CoordinatorEvent]:
        """What has come: the first at once, the end at once, else a batch every `coalesce_s(streams)`, or `interval_s`
        if that is longer.

        streams: how many are open beside this one, itself included. A cancelled call loses nothing.
        """
        await self._news.wait()
        pause = self._sent + max(coalesce_s(streams), interval_s) - self._clock()
        if pause > 0 and not self._urgent.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._urgent.wait()
        self._sent = self._clock()
        self._news.clear()
        events, self._events = self._events, []
        return _joined(events)


def _joined(events: list[CoordinatorEvent]) -> list[CoordinatorEvent]:
    """Each run of deltas as one, in their order. Joined once: adding one by one would copy the run for each."""
    joined: list[CoordinatorEvent] = []
    run: list[Delta] = []
    for event in events:
        if isinstance(event, Delta):
            run.append(event)
            continue
        if run:
            joined.append(_one(run))
            run = []
        joined.append(event)
    return [*joined, _one(run)] if run else joined


def _one(run: list[Delta]) -> Delta:
    if len(run) == 1:
        return run[0]
    return Delta(
        "".join(delta.reasoning for delta in run),
        "".join(delta.content for delta in run),
        [token for delta in run for token in delta.tokens],
        [note for delta in run for note in delta.notes],
        prompt=[note for delta in run for note in delta.prompt],
    )
