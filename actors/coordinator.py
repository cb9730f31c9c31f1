"""The decode loop: many sessions, three models, one turn after another. Plain asyncio; its Serve shell is elsewhere.

A turn: admit -> absorb replies -> ask what rows lack -> decide complete rows -> commit tokens -> extend -> send.
Readiness is per session: a long prefill or a slow replica holds up nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import ssl
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace

from actors import admission
from actors.config import ServiceConfig
from actors.deciding import Chosen, Counts, Decider, Stuck, Wider
from actors.decoding.session import Session
from actors.exchange import Exchange, Fault
from actors.languages import Languages
from actors.links import Links, Locate, Replica
from actors.live import Live
from actors.requests import Event, Finished, FinishReason, Generate, Rejected, Role
from actors.tokenizer import RoleTokenizer
from actors.wire.messages import Message, Refusal, Rows

log = logging.getLogger(__name__)

TICK_S = 0.5  # how often deadlines are looked at
MAX_FAULTS = 8  # refusals in a row of one row, after which its session is given up


@dataclass(frozen=True, slots=True)
class CoordinatorLoad:
    """What a coordinator has on its hands, and what it has decided since its start."""

    sessions: int
    waiting: int
    counts: Counts


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
        self._exchange = Exchange(config.exchange, self._languages)
        self._decider = Decider(config.exchange)
        self._links = Links(
            secret,
            locate,
            on_message=self._hear,
            on_lost=self._lose,
            on_found=lambda replica: self._wake(),
            connect_s=config.deadlines.connect_s,
            tls=tls,
        )
        self._waiting: deque[Live] = deque()
        self._lives: dict[int, Live] = {}
        self._stranded: list[Live] = []
        self._inbox: list[Message] = []
        self._awake = self._stopped = False
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to follow the directory and to decode."""
        self._links.start()
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def stop(self) -> None:
        """End every session with an error and close the connections."""
        for live in [*self._lives.values(), *self._waiting]:
            self._finish(live, "error", "the coordinator was stopped")
        self._stopped = True
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
        await self._links.stop()

    def missing_roles(self) -> tuple[Role, ...]:
        """Roles that no connected replica plays."""
        return self._links.missing_roles()

    def load(self) -> CoordinatorLoad:
        """What is being decoded, and counts since the start."""
        return CoordinatorLoad(len(self._lives), len(self._waiting), replace(self._decider.counts))

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
                for event in await self._news(live, deadline):
                    yield event
                    if isinstance(event, Finished):
                        return
        finally:
            self._release(live)

    # -- requests ------------------------------------------------------------------------------------------------

    def _refusal(self, request: Generate) -> Rejected | None:
        room = self._config.coordinator.max_sessions + self._config.coordinator.max_waiting
        if len(self._lives) + len(self._waiting) >= room:
            return Rejected("overloaded", "too many requests are waiting; try again later", retry_after_s=1.0)
        return admission.refusal(request, self._languages)

    def _accept(self, request: Generate) -> Live:
        roles = tuple(request.prompts)
        language = self._languages.language(request.primary, roles, request.thinking)
        request = admission.canonical(request, self._languages)
        seeds = dict.fromkeys(roles, 0)  # each stream is hashed anew when its replica is known
        live = Live(Session(request, language, seeds), secrets.randbits(63), time.time_ns())
        self._waiting.append(live)
        self._wake()
        return live

    async def _news(self, live: Live, deadline: float) -> list[Event]:
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return await live.events.batch(len(self._lives))
        except TimeoutError:
            self._finish(live, "error", f"not finished within {self._config.deadlines.request_s:.0f} s")
            return await live.events.batch()

    def _release(self, live: Live) -> None:
        """Forget a session, finished or not, here and at the models."""
        if not live.over:
            live.session.finish("abort")
        self._exchange.drop(live)
        self._lives.pop(live.key, None)
        for queue in (self._waiting, self._stranded):
            if live in queue:
                queue.remove(live)
        for replica in live.replicas.values():
            replica.outbox.released.append(live.key)
        live.replicas = {}
        self._wake()

    # -- the loop ------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Take a turn soon; what arrives until then is part of it."""
        if not (self._awake or self._stopped):
            self._awake = True
            asyncio.get_running_loop().call_soon(self._guarded_turn)

    def _guarded_turn(self) -> None:
        self._awake = False
        if self._stopped:
            return
        try:
            self._turn()
        except Exception:  # a fault of this program: end what was in the turn, keep the others
            log.exception("a turn failed; its sessions are ended")
            for live in list(self._lives.values()):
                if live.complete or not (live.parts or live in self._stranded):
                    self._finish(live, "error", "internal error while decoding")
            self._links.flush()

    def _turn(self) -> None:
        self._admit()
        messages, self._inbox = self._inbox, []
        for fault in self._exchange.absorb(messages):
            self._mend(fault)
        ready = self._exchange.advance()
        guided, alone = [live for live in ready if live.alpha], [live for live in ready if not live.alpha]
        self._decide(guided)  # may begin rows without guidance: these are not ready
        self._decide(alone)
        self._links.flush()

    def _admit(self) -> None:
        while self._waiting and len(self._lives) < self._config.coordinator.max_sessions:
            live = self._waiting.popleft()
            self._lives[live.key] = live
            self._next_row(live)
        stranded, self._stranded = self._stranded, []
        for live in stranded:
            self._next_row(live)

    def _next_row(self, live: Live) -> None:
        """Extend the models by the session's newest tokens, or let it wait for a role that is away."""
        session = live.session
        alpha = 0.0 if live.past_context else session.alpha()
        roles: Sequence[Role] = ("target", "guider", "guider_base") if alpha else (live.primary,)
        if not all([self._bind(live, role) for role in roles]):
            live.stranded_since = live.stranded_since or time.monotonic()
            self._stranded.append(live)
            return
        live.stranded_since = None
        if len(session.primary) >= self._limit(live, live.primary):
            self._finish(live, "length")
            return
        if alpha and any(len(session.streams[role]) > self._limit(live, role) for role in roles):
            if self._config.beyond_context == "error":
                self._finish(live, "length")
                return
            live.past_context, alpha = True, 0.0
        live.row_since = time.monotonic()
        self._exchange.begin(live, alpha)

    def _limit(self, live: Live, role: Role) -> int:
        """Positions that a role's model computes for one session."""
        replica = live.replicas.get(role)
        return replica.welcome.max_position if replica is not None else 1 << 31

    def _bind(self, live: Live, role: Role) -> bool:
        """Give the session a replica of the role; False if nobody plays it now."""
        if role not in live.replicas:
            replica = self._links.pick(role)
            if replica is None:
                return False
            live.replicas[role] = replica
            live.session.streams[role].reseed(replica.welcome.hash_seed)
        return True

    def _decide(self, lives: list[Live]) -> None:
        """Take complete rows to their tokens, or look at them more widely first."""
        if not lives:
            return
        for live, verdict in zip(lives, self._decider.decide(lives), strict=True):
            if isinstance(verdict, Wider):
                self._exchange.widen(live, verdict.k)
            elif isinstance(verdict, Stuck):
                self._finish(live, "error", "the request's bans and biases leave no token to choose")
            else:
                self._commit(live, verdict)

    def _commit(self, live: Live, chosen: Chosen) -> None:
        live.events.emit(live.session.commit(chosen.token, live.alpha, chosen.changed))
        live.faults = live.misses = 0
        self._exchange.drop(live)
        if live.over:
            self._end(live)
        else:
            self._next_row(live)

    # -- faults --------------------------------------------------------------------------------------------------

    def _hear(self, replica: Replica, message: Message) -> None:
        if isinstance(message, Rows):
            replica.heard_at = time.monotonic()
        self._inbox.append(message)
        self._wake()

    def _mend(self, fault: Fault) -> None:
        """A model refused an item: re-send, wait, or give up; the session's choices are the same in the end."""
        live, role = self._lives.get(fault.live.key), fault.role
        if live is None:
            return
        held = {Refusal.KV_MISS: fault.detail, Refusal.ROW_GONE: len(live.session.streams[role])}.get(fault.code, 0)
        if fault.code in (Refusal.SUPERSEDED, Refusal.BAD_ITEM):
            self._finish(live, "error", f"the {role} model refused the request ({fault.code.name.lower()})")
            return
        if fault.code in (Refusal.FULL, Refusal.KV_MISS):
            live.misses += 1  # no room now, or evicted: it waits for older sessions, and that is no fault
            live.row_since = time.monotonic() + fault.detail * (fault.code == Refusal.FULL) / 1000
        else:
            live.faults += 1
        if live.faults > MAX_FAULTS:
            self._finish(live, "error", f"the {role} model failed {live.faults} times in a row")
        elif delay := fault.pause():
            asyncio.get_running_loop().call_later(delay, self._again, live, role, held, live.session.generated)
        else:
            self._again(live, role, held, live.session.generated)

    def _again(self, live: Live, role: Role, held: int, generated: int) -> None:
        """Ask a role for its part of the row anew, unless the session has gone on in the meantime."""
        if live.key in self._lives and role in live.parts and role in live.replicas and not live.over:
            if live.session.generated == generated:
                self._exchange.again(live, role, held)
                self._wake()

    def _lose(self, replica: Replica) -> None:
        """A connection is gone: its sessions start their row anew, with another replica or the restarted one."""
        for live in list(self._lives.values()):
            lost = [role for role, bound in live.replicas.items() if bound is replica]
            for role in lost:
                del live.replicas[role]
            if lost and not live.over and live not in self._stranded:
                self._restart_row(live)
        self._wake()

    def _restart_row(self, live: Live) -> None:
        self._exchange.drop(live)
        for role in live.replicas:
            stream = live.session.streams[role]
            stream.held = min(stream.held, len(stream) - 1)
        self._next_row(live)

    async def _watch(self) -> None:
        """Hold every wait against its deadline."""
        while True:
            await asyncio.sleep(TICK_S)
            now, limits = time.monotonic(), self._config.deadlines
            for live in list(self._stranded):
                if live.stranded_since is not None and now - live.stranded_since > limits.role_missing_s:
                    away = ", ".join(self.missing_roles())
                    self._finish(live, "error", f"no replica of {away} came back within {limits.role_missing_s:.0f} s")
            for live in list(self._lives.values()):
                if any(live.tickets.values()) and now - live.row_since > limits.step_s:
                    self._hang(live)
            if self._stranded or self._waiting:
                self._wake()

    def _hang(self, live: Live) -> None:
        """A row is overdue: give up the models that owe an answer and are silent; losing them restarts the row."""
        limit, now = self._config.deadlines.step_s, time.monotonic()
        owing = [live.replicas[role] for role, owed in live.tickets.items() if owed]
        silent = [replica for replica in owing if now - replica.heard_at > limit]
        live.faults += bool(silent)
        if live.faults > MAX_FAULTS:
            self._finish(live, "error", "the models did not answer in time")
            return
        for replica in silent:
            self._links.drop(replica, TimeoutError(f"no answer in {limit:g} s"))

    def _finish(self, live: Live, reason: FinishReason, error: str | None = None) -> None:
        """End a session from outside its own tokens."""
        if not live.over:
            live.events.emit(live.session.finish(reason))
            self._end(live, error)

    def _end(self, live: Live, error: str | None = None) -> None:
        session = live.session
        assert session.finish_reason is not None
        live.events.emit(Finished(session.finish_reason, session.usage(), session.stop_reason, error))
        self._release(live)
