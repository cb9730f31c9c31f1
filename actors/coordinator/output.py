"""Events of an answer on their way to its reader, coalesced more the more streams are open."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from actors.api.generation import CoordinatorEvent, Delta
from actors.decoding.session import AnswerPart

COALESCE_S = 0.05  # least seconds between two messages of a stream, except before the first and the last
MESSAGES_PER_S = 500  # of one coordinator: router and proxy need about a millisecond for a message
MOST_S = 0.5  # longer pauses no longer look like a stream


def coalesce_s(streams: int) -> float:
    """Seconds between two messages of a stream, so that all streams stay below MESSAGES_PER_S together."""
    return min(max(COALESCE_S, streams / MESSAGES_PER_S), MOST_S)


_PARTS = (AnswerPart, Delta)


class EventQueue:
    """A queue of events for one reader, which joins consecutive parts of the answer into one delta."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._events: list[CoordinatorEvent | AnswerPart] = []
        self._ended = False  # the last event is in the queue
        self._sent_at = float("-inf")
        self._reader: asyncio.Future[None] | None = None  # resolved when events may be read, or when it waited enough
        self._pausing = False  # True while the reader waits, whatever is in the queue

    def emit(self, event: CoordinatorEvent | AnswerPart) -> None:
        """Append an event. Any event but a part of the answer is the last one."""
        self._events.append(event)
        if not isinstance(event, _PARTS):
            self._ended, self._pausing = True, False
        if self._reader is not None and not self._pausing:
            self._wake()

    async def batch(
        self, streams: int = 1, interval_s: float = 0.0, limit_s: float | None = None
    ) -> list[CoordinatorEvent]:
        """Wait for the next events. The first and the last are returned at once.

        Between them, batches are `coalesce_s(streams)` or `interval_s` seconds apart, whichever is longer. streams:
        number of open streams, this one included. Empty after `limit_s` seconds without a batch. A cancelled call loses
        no event.
        """
        pause = self._sent_at + max(coalesce_s(streams), interval_s) - self._clock()
        self._pausing = pause > 0 and not self._ended
        if self._pausing or not self._events:
            await self._wait(pause, limit_s)
        if self._pausing:
            return []
        events, self._events = self._events, []
        if events:
            self._sent_at = self._clock()
        return _joined(events)

    async def _wait(self, pause: float, limit_s: float | None) -> None:
        """Wait for `pause` seconds and for an event, but at most `limit_s` seconds."""
        loop = asyncio.get_running_loop()
        self._reader = loop.create_future()
        timers = [loop.call_later(pause, self._pause_over)] if self._pausing else []
        if limit_s is not None:
            timers.append(loop.call_later(limit_s, self._wake))
        try:
            await self._reader
        finally:
            self._reader = None
            for timer in timers:
                timer.cancel()

    def _pause_over(self) -> None:
        self._pausing = False
        if self._events:
            self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def _joined(events: Sequence[CoordinatorEvent | AnswerPart]) -> list[CoordinatorEvent]:
    """Join each run of parts into one delta. All at once: adding them one by one would copy the run each time."""
    joined: list[CoordinatorEvent] = []
    run: list[AnswerPart | Delta] = []
    for event in events:
        if isinstance(event, _PARTS):
            run.append(event)
            continue
        if run:
            joined.append(_one(run))
            run = []
        joined.append(event)
    return [*joined, _one(run)] if run else joined


def _one(run: Sequence[AnswerPart | Delta]) -> Delta:
    return Delta(
        "".join([part.reasoning for part in run]),
        "".join([part.content for part in run]),
        [token for part in run for token in part.tokens],
        [note for part in run for note in part.notes],
        prompt=[note for part in run if isinstance(part, Delta) for note in part.prompt],
    )
