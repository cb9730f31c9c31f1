"""What a consumer has still to hear of a session, in as few messages as it bears."""

from __future__ import annotations

import asyncio
import contextlib
import time

from actors.requests import Delta, Event

COALESCE_S = 0.05  # a stream's messages are at least this far apart, but for the first and the last


class Events:
    """What one consumer has still to hear. Made for one reader."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._news = asyncio.Event()
        self._urgent = asyncio.Event()  # the end is among them
        self._sent = float("-inf")  # when the last batch went out

    def emit(self, event: Event) -> None:
        """Add an event; anything but a delta is the last one."""
        self._events.append(event)
        self._news.set()
        if not isinstance(event, Delta):
            self._urgent.set()

    async def batch(self) -> list[Event]:
        """What has come, neighbouring deltas joined: the first at once, then at most one batch per COALESCE_S."""
        await self._news.wait()
        pause = self._sent + COALESCE_S - time.monotonic()
        if pause > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._urgent.wait()
        self._sent = time.monotonic()
        self._news.clear()
        events, self._events = self._events, []
        return _joined(events)


def _joined(events: list[Event]) -> list[Event]:
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, Delta) and isinstance(last, Delta):
            joined[-1] = last + event
        else:
            joined.append(event)
    return joined
