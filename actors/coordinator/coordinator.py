"""The coordinator: turns a request into a stream of events. Decoding itself is in `actors.coordinator.loop`."""

from __future__ import annotations

import asyncio
import secrets
import ssl
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from functools import partial

from actors.api.generation import CoordinatorEvent, Delta, Generate, Moved, Rejected, Role
from actors.config import ServiceConfig
from actors.coordinator import request_checks
from actors.coordinator.loop import DecodeLoop
from actors.coordinator.prompt_scoring import plan_scoring
from actors.coordinator.replica_pool import Locate
from actors.coordinator.session import ActiveSession
from actors.coordinator.stats import CoordinatorLoad
from actors.decoding.grammar import GrammarError
from actors.decoding.session import Session
from actors.metrics import Recorder
from actors.text.tokenizer import RoleTokenizer
from actors.text.vocabularies import VocabularyRegistry
from actors.warmup import compile_kernels


class Coordinator:
    """Decodes sessions against the replicas that `locate` names.

    Raises UnsupportedTokenizer if a model's tokenizer cannot be used. Call from one event loop only.
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
        self._vocabularies = VocabularyRegistry(tokenizers)
        self._loop = DecodeLoop(config, self._vocabularies, secret, locate, tls)
        self._leaving = False

    async def start(self) -> None:
        """Compile the kernels, connect to the replicas in the directory, and decode. Raises UnsupportedProcessor."""
        await asyncio.to_thread(compile_kernels)
        for served in dict.fromkeys(self._config.served_names.values()):
            await asyncio.to_thread(self._vocabularies.grammars, "target" if served == "guided" else served)
        await self._loop.start()

    async def stop(self) -> None:
        """Hand every session over and close the connections."""
        self._leaving = True
        await self._loop.stop()

    def hand_over(self) -> None:
        """Hand over every session and each later request: this coordinator is about to stop."""
        self._leaving = True
        self._loop.hand_over()

    def missing_roles(self) -> tuple[Role, ...]:
        """Roles without a connected replica."""
        return self._loop.missing_roles()

    def load(self) -> CoordinatorLoad:
        """The current load, and totals since the start."""
        return self._loop.meter.load(self._loop.sessions, len(self._loop.admission), self._loop.parked)

    def measured(self) -> Recorder:
        """The metrics as of now."""
        return self._loop.meter.report(self.load())

    async def generate(self, request: Generate) -> AsyncGenerator[CoordinatorEvent, None]:
        """Decode one sequence. Yields deltas and at last Finished or Moved, or only Rejected.

        An empty delta precedes the compilation of a grammar, which may still end in Rejected.

        Closing the iterator cancels the sequence. Each delta carries what another coordinator needs to continue after
        it. At least every third of `deadlines.peer_timeout_s` a delta is yielded, if need be an empty one, so that a
        reader can tell a slow answer from a coordinator that hangs.
        """
        rejection = self._rejection(request)
        if rejection is not None:
            yield rejection
            return
        if request.grammar:
            yield Delta()  # says that it was begun, before its compilation or replay can crash the process
        active = await self._begin(request)
        if isinstance(active, Rejected):
            yield active
            return
        if self._leaving:
            yield Moved()
            return
        deadline = time.monotonic() + self._config.deadlines.request_s
        emitted = len(active.session.choices)
        self._loop.add(active)
        try:
            while True:
                for event in await self._next_events(active, deadline, request.interval_s):
                    if isinstance(event, Delta):
                        session = active.session
                        event = replace(event, choices=session.choices[emitted:], tally=session.tally())
                        emitted = len(session.choices)
                    yield event
                    if not isinstance(event, Delta):
                        return
        finally:
            self._loop.release(active)

    def _rejection(self, request: Generate) -> Rejected | None:
        return request_checks.rejection(request, self._vocabularies) or self._loop.admission.rejection(request)

    async def _begin(self, request: Generate) -> ActiveSession | Rejected:
        prompt_scoring = None
        if request.prompt_logprobs is not None:
            planned = await asyncio.to_thread(plan_scoring, request, self._vocabularies)  # slow for a long prompt
            if isinstance(planned, Rejected):
                return planned
            request, prompt_scoring = planned
        roles = tuple(request.prompts)
        vocabulary = self._vocabularies.vocabulary(request.primary, roles, request.thinking)
        request = request_checks.canonical(request, self._vocabularies)
        seeds = dict.fromkeys(roles, 0)  # a stream is hashed again when its replica is known
        try:
            start = partial(Session, request, vocabulary, seeds)
            session = await asyncio.to_thread(start) if request.grammar else start()  # a grammar may take seconds
            if request.resume is not None:
                await asyncio.to_thread(session.replay, request.resume)  # slow for a long answer
        except GrammarError as error:
            return Rejected("invalid", str(error))
        return ActiveSession(
            session, secrets.randbits(63), request.arrived, self._loop.planner.acceptance(), prompt_scoring
        )

    async def _next_events(self, active: ActiveSession, deadline: float, interval_s: float) -> list[CoordinatorEvent]:
        """The next events; an empty delta if there are none for long."""
        now = time.monotonic()
        limit_s = min(self._config.deadlines.peer_timeout_s / 3, max(0.0, deadline - now))
        if events := await active.events.batch(self._loop.sessions, interval_s, limit_s):
            return events
        if time.monotonic() < deadline:
            return [Delta()]
        self._loop.fail(active, f"not finished within {self._config.deadlines.request_s:.0f} s")
        return await active.events.batch()
