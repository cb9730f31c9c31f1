"""The decode loop: many sessions, three models, one turn after another. Plain asyncio; its Serve shell is elsewhere.

A turn: admit -> absorb replies -> ask what rows lack -> decide complete rows -> commit tokens -> extend -> send.
Readiness is per session: a long prefill or a slow replica holds up nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import ssl
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field

from actors.config import ServiceConfig
from actors.decoding.decision import Decisions, Row, compare, decide
from actors.decoding.session import Session
from actors.exchange import Exchange, Fault, Live
from actors.languages import Languages
from actors.links import Links, Locate, Replica
from actors.requests import Delta, Event, Finished, FinishReason, Generate, Rejected, Role
from actors.tokenizer import RoleTokenizer
from actors.wire.messages import WHOLE, Message, Refusal

log = logging.getLogger(__name__)

TICK_S = 0.5  # how often deadlines are looked at
COALESCE_S = 0.05  # a stream's messages are at least this far apart, but for the first and the last
MAX_FAULTS = 8  # refusals in a row of one row, after which its session is given up


@dataclass(slots=True)
class Audit:
    """Guided rows held against whole rows so far."""

    rows: int = 0
    differing: int = 0
    total_variation: float = 0.0


@dataclass(slots=True)
class CoordinatorLoad:
    """What a coordinator has on its hands, and what it has seen so far."""

    sessions: int = 0
    waiting: int = 0
    tokens: int = 0
    guided_rows: int = 0
    widened_rows: int = 0
    uncovered_mass: float = 0.0  # summed over guided rows
    audit: Audit = field(default_factory=Audit)


class _Sequence(Live):
    """A live session and the consumer of its events."""

    def __init__(self, session: Session, key: int, age: int) -> None:
        super().__init__(session, key, age)
        self.events: list[Event] = []
        self.news = asyncio.Event()
        self.stranded_since: float | None = None
        self.stop_guidance = False

    @property
    def over(self) -> bool:
        return self.session.finish_reason is not None

    def emit(self, event: Event) -> None:
        self.events.append(event)
        self.news.set()


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
        for small in ("guider", "guider_base"):
            self._languages.map("target", small, config.thinking.end)
        self._exchange = Exchange(config.exchange, self._languages)
        self._links = Links(
            secret,
            locate,
            on_message=self._hear,
            on_lost=self._lose,
            on_found=lambda _: self._wake.set(),
            connect_s=config.deadlines.connect_s,
            tls=tls,
        )
        self._waiting: deque[_Sequence] = deque()
        self._lives: dict[int, _Sequence] = {}
        self._stranded: list[_Sequence] = []
        self._inbox: list[Message] = []
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._stats = CoordinatorLoad()
        self._unaudited = 0  # guided rows since the last audit

    async def start(self) -> None:
        """Begin to follow the directory and to decode."""
        self._links.start()
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._run()), loop.create_task(self._watch())]

    async def stop(self) -> None:
        """End every session with an error and close the connections."""
        for live in [*self._lives.values(), *self._waiting]:
            self._finish(live, "error", "the coordinator was stopped")
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._links.stop()

    def missing_roles(self) -> tuple[Role, ...]:
        """Roles that no connected replica plays."""
        return self._links.missing_roles()

    def load(self) -> CoordinatorLoad:
        """What is being decoded, and counts since the start."""
        self._stats.sessions, self._stats.waiting = len(self._lives), len(self._waiting)
        return self._stats

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
        if len(self._lives) >= self._config.coordinator.max_sessions:
            if len(self._waiting) >= self._config.coordinator.max_waiting:
                return Rejected("overloaded", "too many requests are waiting; try again later", retry_after_s=1.0)
        legal = self._languages.legal(request.primary)
        stray = [i for i, _ in request.sampling.logit_bias if i not in legal]
        stray += [i for i in request.sampling.stop_token_ids if i < 0]
        if stray:
            return Rejected("invalid", f"logit_bias or stop_token_ids name token ids that do not exist: {stray[:8]}")
        if any(not tokens for tokens in request.prompts.values()):
            return Rejected("invalid", "the prompt is empty")
        return None

    def _accept(self, request: Generate) -> _Sequence:
        roles = tuple(request.prompts)
        language = self._languages.language(request.primary, roles, request.thinking)
        seeds = dict.fromkeys(roles, 0)  # each stream is hashed anew when its replica is known
        live = _Sequence(Session(request, language, seeds), secrets.randbits(63), time.time_ns())
        self._waiting.append(live)
        self._wake.set()
        return live

    async def _news(self, live: _Sequence, deadline: float) -> list[Event]:
        """The events that have come: the first at once, then at most one batch per COALESCE_S."""
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await live.news.wait()
        except TimeoutError:
            self._finish(live, "error", f"not finished within {self._config.deadlines.request_s:.0f} s")
        events, live.events = live.events, []
        live.news.clear()
        if live.session.generated > 1 and not live.over:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(COALESCE_S):
                    while not live.over:
                        await live.news.wait()
                        live.news.clear()
            events, live.events = events + live.events, []
        return _merged(events)

    def _release(self, live: _Sequence) -> None:
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
        self._wake.set()

    # -- the loop ------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                self._turn()
            except Exception:  # a fault of this program: end what was in the turn, keep the others
                log.exception("a turn failed; its sessions are ended")
                for live in list(self._lives.values()):
                    if live.complete or not live.parts:
                        self._finish(live, "error", "internal error while decoding")
            await asyncio.sleep(0)

    def _turn(self) -> None:
        self._admit()
        messages, self._inbox = self._inbox, []
        for fault in self._exchange.absorb(messages):
            self._mend(fault)
        ready = self._exchange.advance()
        for guided in (True, False):
            self._decide([self._lives[live.key] for live in ready if bool(live.alpha) is guided], guided)
        self._links.flush()

    def _admit(self) -> None:
        while self._waiting and len(self._lives) < self._config.coordinator.max_sessions:
            live = self._waiting.popleft()
            self._lives[live.key] = live
            self._next_row(live)
        stranded, self._stranded = self._stranded, []
        for live in stranded:
            self._next_row(live)

    def _next_row(self, live: _Sequence) -> None:
        """Extend the models by the session's newest tokens, or let it wait for a role that is away."""
        session = live.session
        if len(session.primary) >= self._limit(live, live.primary):
            self._finish(live, "length")
            return
        alpha = 0.0 if live.stop_guidance else session.alpha()
        roles: Sequence[Role] = ("target", "guider", "guider_base") if alpha else (live.primary,)
        if not all([self._bind(live, role) for role in roles]):
            live.stranded_since = live.stranded_since or time.monotonic()
            self._stranded.append(live)
            return
        live.stranded_since = None
        if alpha and any(len(session.streams[role]) > self._limit(live, role) for role in roles):
            if self._config.beyond_context == "error":
                self._finish(live, "length")
                return
            live.stop_guidance, alpha = True, 0.0
        live.row_since = time.monotonic()
        self._exchange.begin(live, alpha)

    def _limit(self, live: _Sequence, role: Role) -> int:
        """Positions that a role's model computes for one session."""
        replica = live.replicas.get(role)
        return replica.welcome.max_position if replica is not None else 1 << 31

    def _bind(self, live: _Sequence, role: Role) -> bool:
        """Give the session a replica of the role; False if nobody plays it now."""
        if role not in live.replicas:
            replica = self._links.pick(role)
            if replica is None:
                return False
            live.replicas[role] = replica
            live.session.streams[role].reseed(replica.welcome.hash_seed)
        return True

    def _decide(self, lives: list[_Sequence], guided: bool) -> None:
        """Choose the next token of each row; a row of which too much is unseen is widened first."""
        if not lives:
            return
        rows = [_row(live) for live in lives]
        decisions = decide(rows, guided)
        for index, live in enumerate(lives):
            if live.audited is not None:
                self._audit(live, rows[index])
            elif live.k != WHOLE and (self._too_little(decisions, index) or self._audit_due(live, rows[index], guided)):
                self._widen(live)
            elif decisions.stuck[index]:
                self._finish(live, "error", "the request's bans and biases leave no token to choose")
            else:
                self._count(live, decisions, index)
                self._commit(
                    live, int(decisions.tokens[index]), bool(decisions.alone[index] != decisions.tokens[index])
                )

    def _too_little(self, decisions: Decisions, index: int) -> bool:
        limit = self._config.exchange.widen_above
        return bool(decisions.stuck[index]) or (limit < 1 and bool(decisions.outside[index] > limit))

    def _widen(self, live: _Sequence) -> None:
        """One wider slice, then the whole row; an audit goes to the whole row at once."""
        wider = self._config.exchange.k * self._config.exchange.widen_factor
        if live.audited is None:
            live.session.widened += live.k == self._config.exchange.k
            self._stats.widened_rows += live.k == self._config.exchange.k
        whole = live.audited is not None or live.k >= wider or wider >= live.replicas[live.primary].welcome.width
        self._exchange.widen(live, WHOLE if whole else wider)

    def _audit_due(self, live: _Sequence, row: Row, guided: bool) -> bool:
        every = self._config.exchange.audit_every
        if not (guided and every):
            return False
        self._unaudited += 1
        if self._unaudited < every:
            return False
        self._unaudited = 0
        live.audited = decide([row], guided)
        return True

    def _audit(self, live: _Sequence, row: Row) -> None:
        """Whole rows of an audited step are here; what the slices chose stands, an audit only measures."""
        assert live.audited is not None
        distance, differs = compare([row], live.audited, decide([row], guided=True))
        self._stats.audit.rows += 1
        self._stats.audit.differing += bool(differs[0])
        self._stats.audit.total_variation += float(distance[0])
        sliced, live.audited = live.audited, None
        self._count(live, sliced, 0)
        self._commit(live, int(sliced.tokens[0]), bool(sliced.alone[0] != sliced.tokens[0]))

    def _count(self, live: _Sequence, decisions: Decisions, index: int) -> None:
        self._stats.tokens += 1
        if live.alpha:
            uncovered = max(0.0, float(decisions.uncovered[index]))
            live.session.uncovered += uncovered
            self._stats.uncovered_mass += uncovered
            self._stats.guided_rows += 1

    def _commit(self, live: _Sequence, token: int, changed: bool) -> None:
        delta = live.session.commit(token, live.alpha, changed)
        live.faults = 0
        self._exchange.drop(live)
        live.emit(delta)
        if live.over:
            self._emit_end(live)
        else:
            self._next_row(live)

    # -- faults --------------------------------------------------------------------------------------------------

    def _hear(self, replica: Replica, message: Message) -> None:
        self._inbox.append(message)
        self._wake.set()

    def _mend(self, fault: Fault) -> None:
        """A model refused an item: re-send, wait, or give up; the session's choices are the same in the end."""
        live, role = self._lives.get(fault.live.key), fault.role
        if live is None:
            return
        held = {Refusal.KV_MISS: fault.detail, Refusal.ROW_GONE: len(live.session.streams[role])}.get(fault.code, 0)
        if fault.code in (Refusal.SUPERSEDED, Refusal.BAD_ITEM):
            self._finish(live, "error", f"the {role} model refused the request ({fault.code.name.lower()})")
            return
        live.faults += fault.code != Refusal.FULL
        if live.faults > MAX_FAULTS:
            self._finish(live, "error", f"the {role} model failed {live.faults} times in a row")
            return
        delay = fault.detail / 1000 if fault.code == Refusal.FULL else 0.0
        if fault.code == Refusal.FAILED:
            delay = min(2.0, 0.05 * 2**live.faults) * random.uniform(0.5, 1.0)
        if delay:
            asyncio.get_running_loop().call_later(delay, self._again, live, role, held, live.session.generated)
        else:
            self._again(live, role, held, live.session.generated)

    def _again(self, live: _Sequence, role: Role, held: int, generated: int) -> None:
        """Ask a role for its part of the row anew, unless the session has gone on in the meantime."""
        if live.key in self._lives and role in live.parts and role in live.replicas and not live.over:
            if live.session.generated == generated:
                self._exchange.again(live, role, held)
                self._wake.set()

    def _lose(self, replica: Replica) -> None:
        """A connection is gone: its sessions start their row anew, with another replica or the restarted one."""
        for live in list(self._lives.values()):
            lost = [role for role, bound in live.replicas.items() if bound is replica]
            for role in lost:
                del live.replicas[role]
            if lost and not live.over and live not in self._stranded:
                self._restart_row(live)
        self._wake.set()

    def _restart_row(self, live: _Sequence) -> None:
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
                if live.parts and now - live.row_since > limits.step_s:
                    self._hang(live)
            if self._stranded or self._waiting:
                self._wake.set()

    def _hang(self, live: _Sequence) -> None:
        """A row is overdue: give up the replicas that owe an answer; losing them restarts the row elsewhere."""
        live.faults += 1
        if live.faults > MAX_FAULTS:
            self._finish(live, "error", "the models did not answer in time")
            return
        live.row_since = time.monotonic()
        for role in [role for role, part in live.parts.items() if not part.complete]:
            self._links.drop(live.replicas[role], TimeoutError(f"no answer in {self._config.deadlines.step_s} s"))

    def _finish(self, live: _Sequence, reason: FinishReason, error: str | None = None) -> None:
        """End a session from outside its own tokens."""
        if not live.over:
            rest = live.session.finish(reason)
            live.emit(rest)
            self._emit_end(live, error)

    def _emit_end(self, live: _Sequence, error: str | None = None) -> None:
        session = live.session
        assert session.finish_reason is not None
        live.emit(Finished(session.finish_reason, session.usage(), session.stop_reason, error))
        self._release(live)


def _row(live: _Sequence) -> Row:
    session = live.session
    guider, base = (live.parts["guider"], live.parts["guider_base"]) if live.alpha else (None, None)
    return Row(
        target=live.parts[live.primary],
        guider=guider,
        guider_base=base,
        alpha=live.alpha,
        sampling=session.request.sampling,
        seed=session.request.seed,
        position=len(session.primary),
        adjust=session.adjust,
    )


def _merged(events: list[Event]) -> list[Event]:
    """Neighbouring deltas joined into one."""
    merged: list[Event] = []
    for event in events:
        last = merged[-1] if merged else None
        if isinstance(event, Delta) and isinstance(last, Delta):
            merged[-1] = Delta(
                last.reasoning + event.reasoning,
                last.content + event.content,
                last.tokens + event.tokens,
                last.notes + event.notes,
            )
        else:
            merged.append(event)
    return merged
