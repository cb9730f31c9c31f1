"""The decode loop: many sessions, three models, one turn after another. Plain asyncio, without Ray.

A turn: admit -> absorb replies -> ask what rows lack -> decide complete rows -> commit tokens -> extend -> send.
A session's rows in flight are a window: the row of its newest token, and those of drafts, which are checked with it.
Readiness is per session: a long prefill or a slow replica holds up nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
from collections.abc import Sequence

from actors.api.generation import Finished, FinishReason, Moved, Role
from actors.config import ServiceConfig
from actors.coordinator.admission import Waiting
from actors.coordinator.candidates import GUIDED
from actors.coordinator.draft_planner import Planner
from actors.coordinator.exchange import Exchange
from actors.coordinator.prompt_scoring import PromptReader
from actors.coordinator.recovery import MAX_FAULTS, Mender
from actors.coordinator.replica_pool import Links, Locate, Replica
from actors.coordinator.session import Live, Window
from actors.coordinator.stats import CoordinatorMeter
from actors.coordinator.verification import Counts, Decider, Judged, Stuck, Wider
from actors.text.vocabularies import Languages
from actors.wire.messages import Drafted, Message, Rows

log = logging.getLogger(__name__)

TICK_S = 0.5  # how often deadlines are looked at
LEAD_TOKENS = 16  # so long before guidance starts the small models begin to read what was said


class DecodeLoop:
    """The sessions of one coordinator. Call from one event loop only."""

    def __init__(
        self, config: ServiceConfig, languages: Languages, secret: bytes, locate: Locate, tls: ssl.SSLContext | None
    ) -> None:
        self._config = config
        self._exchange = Exchange(config.exchange, languages)
        self._prompts = PromptReader(self._exchange, languages)
        self._decider = Decider(config.exchange)
        self.planner = Planner(config.speculation)
        self._links = Links(
            secret,
            locate,
            on_message=self._hear,
            on_lost=self._lose,
            on_found=lambda replica: self._relocate(),
            on_stopping=lambda replica: self._relocate(),
            deadlines=config.deadlines,
            tls=tls,
        )
        self._lives: dict[int, Live] = {}
        self.waiting = Waiting(config, self._lives.values, self._links.candidates)
        self.meter = CoordinatorMeter()
        self._mender = Mender(self, self._exchange, self.waiting, config.deadlines, self._links.drop, self.meter)
        self._stranded: list[Live] = []
        self._inbox: list[tuple[Replica, Message]] = []
        self._awake = self._stopped = False
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to follow the directory and to decode."""
        self._links.start()
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    def hand_over(self) -> None:
        """Send every session to another coordinator."""
        for live in [*self._lives.values(), *self.waiting]:
            live.events.emit(Moved())
            self.release(live)

    async def stop(self) -> None:
        """Hand every session over and close the connections."""
        self.hand_over()
        self._links.flush()
        self._stopped = True
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
        await self._links.stop()

    @property
    def sessions(self) -> int:
        """Sessions that are being decoded."""
        return len(self._lives)

    @property
    def parked(self) -> int:
        """Of these, sessions that wait for room in a model's cache."""
        return sum(bool(live.lacks) for live in self._lives.values())

    @property
    def counts(self) -> Counts:
        """What was decided since the start."""
        return self._decider.counts

    def missing_roles(self) -> tuple[Role, ...]:
        """Roles that no connected replica plays."""
        return self._links.missing_roles()

    def add(self, live: Live) -> None:
        """Decode a session as soon as there is a place for it."""
        if live.over:  # all that was left of a resumed one was to say so
            self._end(live)
            return
        self.waiting.add(live)
        self.wake()

    def release(self, live: Live) -> None:
        """Forget a session, finished or not, here and at the models."""
        if not live.over:
            live.session.finish("abort")
        self._exchange.drop(live)
        self._lives.pop(live.key, None)
        self.waiting.remove(live)
        if live in self._stranded:
            self._stranded.remove(live)
        for replica in live.replicas.values():
            replica.outbox.released.append(live.key)
        live.replicas = {}
        self.wake()

    def wake(self) -> None:
        """Take a turn soon; what arrives until then is part of it."""
        if not (self._awake or self._stopped):
            self._awake = True
            asyncio.get_running_loop().call_soon(self._guarded_turn)

    def _guarded_turn(self) -> None:
        self._awake = False
        if self._stopped:
            return
        began = time.perf_counter()
        try:
            self._turn()
        except Exception:
            log.exception("a turn failed")
            self._after_failed_turn()
        self.meter.turn(time.perf_counter() - began)

    def _after_failed_turn(self) -> None:
        """A fault of this program: what it was about to decide ends, or got no token in many turns on end; the others
        start their rows anew, for the replies that the turn had taken are lost."""
        for live in list(self._lives.values()):
            if live in self._stranded:
                continue
            try:
                live.faults += 1
                if live.window is None or live.window.ready() or live.faults > MAX_FAULTS:
                    self.fail(live, "internal error while decoding")
                else:
                    self._restart(live)
            except Exception:
                log.exception("a session cannot be started anew")
                self.fail(live, "internal error while decoding")
        self._send()

    def _turn(self) -> None:
        messages, self._inbox = self._inbox, []
        for fault in self._exchange.absorb(messages):
            self._mender.mend(fault)
        self._admit()
        windows = self._prompts.tell(self._exchange.advance(), self._next_window)
        while windows:
            judged = self._decider.judge(windows)
            windows = [window for window, rows in zip(windows, judged, strict=True) if self._follow(window, rows)]
        self._send()

    def _send(self) -> None:
        self._exchange.ask_straddlers()
        self._links.flush()

    def _admit(self) -> None:
        for live in self.waiting.admit(self._needs):
            self._lives[live.key] = live
            self._next_window(live)
        stranded, self._stranded = self._stranded, []
        for live in stranded:
            self._next_window(live)

    def _next_window(self, live: Live) -> None:
        """Extend the models by the session's newest tokens, or let it wait for a role that is away."""
        session = live.session
        guided = bool(live.alpha())
        roles = self._needs(live)
        if not all([self._bind(live, role) for role in roles]):
            live.stranded_since = live.stranded_since or time.monotonic()
            self._stranded.append(live)
            return
        live.stranded_since = None
        if live.reading is not None:
            if not self._prompts.ask(live, live.reading):
                self._next_window(live)
            return
        if session.request.only_prompt or len(session.primary) >= live.limit(live.primary):
            self.finish(live, "length")
            return
        # The primary's last position ends an answer; a small model's last row still gives a token.
        room = min([live.room(role) - (role == live.primary) for role in roles])
        if guided and room < 0:
            if self._config.beyond_context == "error":
                self.finish(live, "length")
                return
            live.past_context, guided, roles = True, False, (live.primary,)
            room = live.room(live.primary) - 1
        live.row_since = time.monotonic()
        plan = self.planner.plan(live, guided, room, len(self._lives))
        self._exchange.begin(live, guided, plan.guesses, plan.drafts)
        if not guided and session.generated:
            self._read_ahead(live, GUIDED[1:] if live.alpha(LEAD_TOKENS) else roles[1:])

    def _needs(self, live: Live) -> tuple[Role, ...]:
        """The roles that a session cannot go on without now."""
        return live.reading.roles if live.reading is not None else self._roles(live, bool(live.alpha()))

    def _roles(self, live: Live, guided: bool) -> tuple[Role, ...]:
        """The roles that take part in the next window."""
        if guided:
            return GUIDED
        return (live.primary, "guider") if self.planner.drafter(live, guided) == "guider" else (live.primary,)

    def _read_ahead(self, live: Live, roles: Sequence[Role]) -> None:
        """Guidance or drafting starts soon: small models read in the background, where somebody plays them."""
        for role in roles:
            if (live.window is None or role != live.window.drafter) and self._bind(live, role):
                if live.room(role) >= 0:
                    self._exchange.read(live, role)

    def _bind(self, live: Live, role: Role) -> bool:
        """Give the session a replica of the role; False if nobody plays it now."""
        if role not in live.replicas:
            replica = self._links.pick(role)
            if replica is None:
                return False
            self.meter.resent(role, live.session.streams[role].held)  # where it was bound before
            live.bind(role, replica)
        return True

    def _follow(self, window: Window, judged: Sequence[Judged]) -> bool:
        """Take decided rows to their tokens, in order. Whether the row after them is complete and not decided yet."""
        live = window.live
        for one in judged:
            if one.alpha != live.alpha():
                return True  # the thinking has just ended: decided anew
            row = window.rows[window.next]
            verdict = self._decider.verdict(row, one)
            if isinstance(verdict, Wider):
                self._exchange.widen(row, verdict.k)
                return False
            if isinstance(verdict, Stuck):
                self.fail(live, "the request's bans and biases leave no token to choose")
                return False
            drafted = window.drafted(row, verdict.token)
            said = live.session.commit(verdict.token, one.alpha, verdict.changed, drafted, verdict.scores)
            live.events.emit(said)
            live.faults = live.misses = 0
            window.next += 1
            if live.over or not window.goes_on():
                self._close(window)
                return False
        return window.ready()

    def _close(self, window: Window) -> None:
        """A window is over: what it taught is kept, and the session ends or goes on with the next one."""
        live = window.live
        self.planner.learn(window)
        window.settle()
        self._exchange.drop(live)
        if live.over:
            self._end(live)
        else:
            self._next_window(live)

    # -- faults ------------------------------------------------------------------------------------------------

    def _hear(self, replica: Replica, message: Message) -> None:
        if isinstance(message, Rows | Drafted):
            replica.heard_at = time.monotonic()
        self._inbox.append((replica, message))
        self.wake()

    def _lose(self, replica: Replica) -> None:
        """A connection is gone: its sessions start their row anew, with another replica or the restarted one."""
        for live in list(self._lives.values()):
            lost = [role for role, bound in live.replicas.items() if bound is replica]
            for role in lost:
                del live.replicas[role]
            if lost and not live.over and live not in self._stranded:
                self._restart(live)
        self.wake()

    def _relocate(self) -> None:
        """Replicas came or are about to go: sessions leave those that go for others, where there are any."""
        for live in list(self._lives.values()):
            leaving = [role for role, bound in live.replicas.items() if bound.endpoint.stopping]
            moving = [role for role in leaving if self._links.stays(role)]
            for role in moving:
                live.replicas.pop(role).outbox.released.append(live.key)
            if moving and live not in self._stranded:
                self._restart(live)
        self.wake()

    def _restart(self, live: Live) -> None:
        """Begin the window anew."""
        self._exchange.drop(live)
        self._next_window(live)

    async def _watch(self) -> None:
        """Hold every wait against its deadline."""
        while True:
            await asyncio.sleep(TICK_S)
            now, limits = time.monotonic(), self._config.deadlines
            for live in list(self._stranded):
                if live.stranded_since is not None and now - live.stranded_since > limits.missing_s:
                    away = ", ".join(self.missing_roles())
                    self.fail(live, f"no replica of {away} came back within {limits.missing_s:g} s")
            self._mender.overdue(list(self._lives.values()))
            self.waiting.tick()
            if self._stranded or self.waiting or self.waiting.parked:
                self.wake()

    def decodes(self, live: Live) -> bool:
        """Whether the session is being decoded."""
        return live.key in self._lives

    def fail(self, live: Live, error: str) -> None:
        """End a session with an error, which is a sentence for the client."""
        self.finish(live, "error", error)

    def finish(self, live: Live, reason: FinishReason, error: str | None = None) -> None:
        """End a session from outside its own tokens."""
        if not live.over:
            live.events.emit(live.session.finish(reason))
            self._end(live, error)

    def _end(self, live: Live, error: str | None = None) -> None:
        session = live.session
        assert session.finish_reason is not None
        live.events.emit(Finished(session.finish_reason, session.usage(), session.stop_reason, error))
        self.release(live)
