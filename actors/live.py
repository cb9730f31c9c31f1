"""A session on its way through a coordinator: where its caches are, the row in flight, and who reads its events."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

from actors.decoding.candidates import Ids, Part
from actors.decoding.decision import Decisions, Row
from actors.decoding.session import Session
from actors.requests import Delta, Event, Role

if TYPE_CHECKING:
    from actors.links import Replica

COALESCE_S = 0.05  # a stream's messages are at least this far apart, but for the first and the last


class Live:
    """One session, the replicas that it is bound to, and the row in flight."""

    def __init__(self, session: Session, key: int, age: int) -> None:
        self.session, self.key, self.age = session, key, age
        self.events = Events()
        self.epoch = 1
        self.replicas: dict[Role, Replica] = {}
        self.parts: dict[Role, Part] = {}
        self.ids: Ids | None = None  # the row's candidates, once all that propose some have answered
        self.tickets: dict[Role, set[int]] = {}  # of what was asked for the row in flight
        self.alpha = 0.0
        self.k = 0  # width of the row's slices; WHOLE: whole rows
        self.audited: Decisions | None = None  # what the slices decided, while whole rows are fetched to check it
        self.row_since = 0.0
        self.faults = 0  # refusals of the row in flight
        self.misses = 0  # how often there was no room for it, or its cache was gone
        self.stranded_since: float | None = None  # when it began to wait for a role that nobody plays
        self.past_context = False  # a small model's positions are used up: the target goes on alone

    @property
    def primary(self) -> Role:
        """The role whose vocabulary the answer is in."""
        return self.session.request.primary

    @property
    def complete(self) -> bool:
        """Whether every part of the row in flight has come."""
        return self.ids is not None and all(part.complete for part in self.parts.values())

    @property
    def over(self) -> bool:
        """Whether the answer is finished."""
        return self.session.finish_reason is not None

    def row(self) -> Row:
        """The row in flight, for the decision."""
        request = self.session.request
        small = (self.parts["guider"], self.parts["guider_base"]) if self.alpha else (None, None)
        assert self.ids is not None
        return Row(
            ids=self.ids,
            target=self.parts[self.primary],
            guider=small[0],
            guider_base=small[1],
            alpha=self.alpha,
            sampling=request.sampling,
            seed=request.seed,
            position=len(self.session.primary),
            adjust=self.session.adjust,
        )


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
