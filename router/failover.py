"""Continues generations on another coordinator.

A coordinator may die, hang or be stopped during an answer. Another coordinator needs only the tokens chosen so far to
continue: the client sees a pause, then the same tokens as without the fault.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import cast

from actors.api.generation import CoordinatorEvent, Delta, Event, Generate, Moved, Rejected, Resume, Tally
from actors.config import Deadlines
from actors.metrics import Recorder
from router.backend import Coordinators, Status, Unavailable

log = logging.getLogger(__name__)

MAX_LOSSES = 20  # lost coordinators without a token in between: this request itself may crash them
MAX_GRAMMAR_LOSSES = 2  # the same for coordinators that began a grammar, which is likelier to crash them
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0


class HandedOver(Unavailable):
    """No coordinator died: the one that had the request is about to stop or has no room, or there is none now."""


class FailoverBackend:
    """A `Backend` over coordinators that may be lost at any time.

    Raises Unavailable if no event arrived for `deadlines.reconnect_timeout_s`, after MAX_LOSSES losses without a token,
    or if the service is being shut down.
    """

    def __init__(self, coordinators: Coordinators, deadlines: Deadlines, recorder: Recorder | None = None) -> None:
        self._coordinators, self._deadlines = coordinators, deadlines
        self._resumes = (recorder or Recorder()).counter("thinklogit_resumes")

    async def generate(self, request: Generate) -> AsyncIterator[Event]:
        """See router.backend.Backend.generate."""
        progress = _Progress(request)
        while True:
            begun = False
            try:
                async with aclosing(self._attempt(progress.request())) as events:
                    async for event in events:
                        begun = True
                        if isinstance(event, Moved):
                            raise HandedOver("its coordinator hands it over")
                        if isinstance(event, Delta):
                            if (shown := progress.add(event)) is not None:
                                yield shown
                        else:
                            yield event
                            return
            except Unavailable as error:
                progress.add_loss(error, begun, self._deadlines.reconnect_timeout_s)
            if pause := progress.pause():
                if await self._coordinators.ending():
                    raise Unavailable("the service is being shut down")
                await asyncio.sleep(pause)

    async def status(self) -> Status:
        """See router.backend.Backend.status."""
        return await self._coordinators.status()

    async def _attempt(self, request: Generate) -> AsyncGenerator[CoordinatorEvent, None]:
        """The events of one coordinator. Raises Unavailable if it is lost or silent, or rejects a resumed request."""
        peer_timeout_s = self._deadlines.peer_timeout_s
        if request.resumed:
            self._resumes.add()
        generated = cast("AsyncGenerator[CoordinatorEvent, None]", self._coordinators.generate(request))
        async with aclosing(generated) as events:
            while True:
                try:
                    async with asyncio.timeout(peer_timeout_s):
                        event = await anext(events, None)
                except TimeoutError:
                    raise Unavailable(f"its coordinator said nothing for {peer_timeout_s:g} s") from None
                if event is None:
                    raise Unavailable("its coordinator ended the stream before the answer's end")
                if isinstance(event, Rejected) and event.code != "invalid" and request.resume is not None:
                    raise HandedOver(event.message)  # it was admitted before
                yield event


class _Progress:
    """State of one generation that another coordinator needs to continue it."""

    def __init__(self, request: Generate) -> None:
        self._request = request
        self._choices: list[int] = []
        self._scored = 0
        self._tally: Tally | None = None  # None: not yet admitted
        self._last_event_at = time.monotonic()
        self._losses = 0  # since the last token
        self._deaths = 0  # of these, coordinators that had begun and were not told to stop

    def request(self) -> Generate:
        """The request for the next coordinator."""
        if self._tally is None:
            return self._request
        return replace(self._request, resume=Resume(list(self._choices), self._tally, self._scored))

    def add(self, delta: Delta) -> Delta | None:
        """Record a coordinator's delta. Returns the client's part of it, None if it has none."""
        self._last_event_at = time.monotonic()
        self._tally = delta.tally or self._tally
        self._choices += delta.choices
        self._scored += len(delta.prompt)
        if delta.choices or delta.prompt:
            self._losses = self._deaths = 0
        if not (delta.tokens or delta.reasoning or delta.content or delta.prompt):
            return None
        return Delta(delta.reasoning, delta.content, delta.tokens, delta.notes, prompt=delta.prompt)

    def add_loss(self, error: Unavailable, begun: bool, reconnect_timeout_s: float) -> None:
        """Record the loss of a coordinator. Raises Unavailable if that was the last attempt.

        begun: an event of this coordinator had arrived. Serve sends requests to a dead one until it has noticed.
        """
        self._losses += 1
        self._deaths += begun and not isinstance(error, HandedOver)
        log.warning("%s: %s; %d tokens are kept", self._request.name_in_logs, error.message, len(self._choices))
        if self._losses >= MAX_LOSSES:
            raise Unavailable(f"{self._losses} coordinators were lost without a token in between") from error
        if self._request.grammar and self._deaths >= MAX_GRAMMAR_LOSSES:
            raise Unavailable(
                f"{self._deaths} coordinators were lost while they decoded with this grammar: it is tried on no other"
            ) from error
        if time.monotonic() - self._last_event_at > reconnect_timeout_s:
            raise Unavailable(
                f"no coordinator has taken the request on for {reconnect_timeout_s:g} s: {error.message}"
            ) from error

    def pause(self) -> float:
        """Seconds before the next attempt, with jitter; 0 after the first loss, since another coordinator may run."""
        if self._losses <= 1:
            return 0.0
        return random.uniform(0.5, 1.0) * min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0**self._losses)
