"""Events of an answer on their way to its reader, coalesced more the more streams are open."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from actors.api.generation import CoordinatorEvent, Delta

COALESCE_S = 0.05  # least seconds between two messages of a stream, except before the first and the last
MESSAGES_PER_S = 500  # of one coordinator: router and proxy need about a millisecond for a message
MOST_S = 0.5  # longer pauses no longer look like a stream


def coalesce_s(streams: int) -> float:
    """Seconds between two messages of a stream, so that all streams stay below MESSAGES_PER_S together."""
    return min(max(COALESCE_S, streams / MESSAGES_PER_S), MOST_S)


class EventQueue:
    """A queue of events for one reader, which joins consecutive deltas."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._events: list[CoordinatorEvent] = []
        self._filled = asyncio.Event()
        self._ended = asyncio.Event()  # the last event is in the queue
        self._sent_at = float("-inf")

    def emit(self, event: CoordinatorEvent) -> None:
        """Append an event. Any event but a delta is the last one."""
        self._events.append(event)
        self._filled.set()
        if not isinstance(event, Delta):
            self._ended.set()

    async def batch(self, streams: int = 1, interval_s: float = 0.0) -> list[CoordinatorEvent]:
        """Wait for the next events. The first and the last are returned at once.

        Between them, batches are `coalesce_s(streams)` or `interval_s` seconds apart, whichever is longer. streams:
        number of open streams, this one included. A cancelled call loses no event.
        """
        await self._filled.wait()
        pause = self._sent_at + max(coalesce_s(streams), interval_s) - self._clock()
        if pause > 0 and not self._ended.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._ended.wait()
        self._sent_at = self._clock()
        self._filled.clear()
        events, self._events = self._events, []
        return _joined(events)


def _joined(events: list[CoordinatorEvent]) -> list[CoordinatorEvent]:
    """Join each run of deltas into one. All at once: adding deltas one by one would copy the run each time."""
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
