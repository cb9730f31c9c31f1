"""Coordinators: requests in, events out. The decoding itself is `actors.loop`; the Serve shell is elsewhere."""

from __future__ import annotations

import asyncio
import secrets
import ssl
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, replace

from actors import admission
from actors.config import ServiceConfig
from actors.deciding import Counts
from actors.decoding.session import Session
from actors.languages import Languages
from actors.links import Locate
from actors.live import Live
from actors.loop import DecodeLoop
from actors.requests import Event, Finished, Generate, Rejected, Role
from actors.tokenizer import RoleTokenizer


@dataclass(frozen=True, slots=True)
class CoordinatorLoad:
    """What a coordinator has on its hands, and what it has decided since its start."""

    sessions: int
    waiting: int
    counts: Counts
    drafted: int = 0  # drafts that were checked
    accepted: int = 0
    turns_s: float = 0.0  # that its turns took


class Coordinator:
    """Decodes sessions against the replicas that `locate` names.

    Raises VocabularyError when the models' tokens do not fit. Call from one event loop only.
    """

    def __init__(
        self,
        config: ServiceConfig,
        tokenizers: Mapping[Role, RoleTokenizer],
        secret: bytes,
        locate: Locate,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._config = config
        self._languages = Languages(tokenizers)
        self._loop = DecodeLoop(config, self._languages, secret, locate, tls)

    async def start(self) -> None:
        """Begin to follow the directory and to decode."""
        await self._loop.start()

    async def stop(self) -> None:
        """End every session with an error and close the connections."""
        await self._loop.stop()

    def missing_roles(self) -> tuple[Role, ...]:
        """Roles that no connected replica plays."""
        return self._loop.missing_roles()

    def load(self) -> CoordinatorLoad:
        """What is being decoded, and counts since the start."""
        loop = self._loop
        drafted, accepted = loop.planner.drafted, loop.planner.accepted
        return CoordinatorLoad(loop.sessions, len(loop.waiting), replace(loop.counts), drafted, accepted, loop.turns_s)

    async def generate(self, request: Generate) -> AsyncGenerator[Event, None]:
        """Decode one sequence: deltas and at last Finished, or only Rejected. Closing the iterator cancels it."""
        refusal = self._refusal(request)
        if refusal is not None:
            yield refusal
            return
        live = self._accept(request)
        deadline = time.monotonic() + self._config.deadlines.request_s
        try:
            while True:
                for event in await self._news(live, deadline, request.interval_s):
                    yield event
                    if isinstance(event, Finished | Rejected):
                        return
        finally:
            self._loop.release(live)

    def _refusal(self, request: Generate) -> Rejected | None:
        return admission.refusal(request, self._languages) or self._loop.waiting.refusal(request)

    def _accept(self, request: Generate) -> Live:
        roles = tuple(request.prompts)
        language = self._languages.language(request.primary, roles, request.thinking)
        request = admission.canonical(request, self._languages)
        seeds = dict.fromkeys(roles, 0)  # each stream is hashed anew when its replica is known
        session = Session(request, language, seeds)
        live = Live(session, secrets.randbits(63), time.time_ns(), self._loop.planner.acceptance())
        self._loop.add(live)
        return live

    async def _news(self, live: Live, deadline: float, interval_s: float) -> list[Event]:
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return await live.events.batch(self._loop.sessions, interval_s)
        except TimeoutError:
            self._loop.finish(live, "error", f"not finished within {self._config.deadlines.request_s:.0f} s")
            return await live.events.batch()
