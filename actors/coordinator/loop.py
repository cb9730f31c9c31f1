"""The decode loop of a coordinator: many sessions, three models, one turn after another. Plain asyncio, without Ray.

A turn receives replies, admits sessions, verifies complete rows, commits their tokens, and sends the next requests.
The rows in flight of a session are its window: the row of the newest token, and those of the drafts behind it. Each
session goes on when its own rows are complete, so a long prefill or a slow replica delays no other session.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
from collections.abc import Callable, Sequence

from actors.api.generation import Finished, FinishReason, Moved, Role
from actors.config import ServiceConfig
from actors.coordinator.admission import AdmissionQueue
from actors.coordinator.candidates import GUIDED
from actors.coordinator.draft_planner import DraftPlanner
from actors.coordinator.exchange import Exchange
from actors.coordinator.prompt_scoring import PromptScorer
from actors.coordinator.recovery import MAX_FAULTS, FaultHandler
from actors.coordinator.replica_pool import Locate, Replica, ReplicaPool
from actors.coordinator.session import ActiveSession, VerificationWindow
from actors.coordinator.states import SessionState
from actors.coordinator.stats import CoordinatorMeter
from actors.coordinator.verification import NeedsLegalLogits, NeedsWiderTopK, NoLegalToken, RowDecision, Verifier
from actors.decoding.grammar import GrammarError, GrammarMatcher, fill_masks
from actors.text.vocabularies import VocabularyRegistry
from actors.wire.messages import Drafted, Message, Rows

log = logging.getLogger(__name__)

TICK_S = 0.5  # between two checks of deadlines
LEAD_TOKENS = 16  # so many tokens before guidance starts, the small models begin to read the answer


class DecodeLoop:
    """Decodes the sessions of one coordinator. Call from one event loop only."""

    def __init__(
        self,
        config: ServiceConfig,
        vocabularies: VocabularyRegistry,
        secret: bytes,
        locate: Locate,
        tls: ssl.SSLContext | None,
    ) -> None:
        self._config = config
        self._exchange = Exchange(config.exchange, vocabularies)
        self._prompts = PromptScorer(self._exchange, vocabularies)
        self.meter = CoordinatorMeter()
        self._verifier = Verifier(config.exchange, self.meter)
        self.planner = DraftPlanner(config.speculation, self.meter)
        self._pool = ReplicaPool(
            secret,
            locate,
            on_message=self._take_message,
            on_lost=self._restart_sessions_of_lost_replica,
            on_found=lambda replica: self._move_sessions_to_staying_replicas(),
            on_stopping=lambda replica: self._move_sessions_to_staying_replicas(),
            deadlines=config.deadlines,
            width=vocabularies.width,
            tls=tls,
        )
        self._active: dict[int, ActiveSession] = {}
        self.admission = AdmissionQueue(config, self._active.values, self._pool.usable_replicas)
        self._fault_handler = FaultHandler(
            self, self._exchange, self.admission, config.deadlines, self._pool.drop, self.meter
        )
        self._inbox: list[tuple[Replica, Message]] = []
        self._turn_scheduled = self._stopped = False
        self._deadlines_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Connect to the replicas in the directory, and decode."""
        self._pool.start()
        self._deadlines_task = asyncio.get_running_loop().create_task(self._check_deadlines())

    def hand_over(self) -> None:
        """End every session with `Moved`; their routers continue them on other coordinators."""
        for active in [*self._active.values(), *self.admission]:
            active.events.emit(Moved())
            self.release(active)

    async def stop(self) -> None:
        """Hand every session over and close the connections."""
        self.hand_over()
        self._pool.flush()
        self._stopped = True
        if self._deadlines_task is not None:
            self._deadlines_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._deadlines_task
        await self._pool.stop()

    @property
    def sessions(self) -> int:
        """Number of admitted sessions."""
        return len(self._active)

    @property
    def parked(self) -> int:
        """Number of admitted sessions that wait for room in a cache."""
        return self.admission.parked

    def missing_roles(self) -> tuple[Role, ...]:
        """Roles without a connected replica."""
        return self._pool.missing_roles()

    def add(self, active: ActiveSession) -> None:
        """Queue a session; it is decoded as soon as it is admitted."""
        if active.over:  # a resumed session whose last token had been chosen
            self._end(active)
            return
        self.admission.add(active)
        self.wake()

    def release(self, active: ActiveSession) -> None:
        """Forget a session, finished or not, here and at the replicas."""
        if active.state == SessionState.FINISHED:
            return
        if not active.over:
            active.session.finish("abort")
        active.enter(SessionState.FINISHED)
        self._exchange.release(active)
        self._active.pop(active.key, None)
        self.admission.remove(active)
        for replica in active.replicas.values():
            replica.outbox.released.append(active.key)
        active.replicas = {}
        self.wake()

    def wake(self) -> None:
        """Schedule a turn. Messages that arrive before it are part of it."""
        if not (self._turn_scheduled or self._stopped):
            self._turn_scheduled = True
            asyncio.get_running_loop().call_soon(self._guarded_turn)

    def _guarded_turn(self) -> None:
        self._turn_scheduled = False
        if self._stopped:
            return
        began = time.perf_counter()
        try:
            self._turn()
        except Exception:
            log.exception("a turn failed")
            self._after_failed_turn()
        took = time.perf_counter() - began
        self.meter.turn(took)
        self.planner.took(took)

    def _after_failed_turn(self) -> None:
        """Recover from a fault of this program. The turn's replies are lost, so sessions request their rows again.

        A session fails if it has no window, if its next row was complete (that row may be the cause), or after
        MAX_FAULTS.
        """
        for active in list(self._active.values()):
            if active.state == SessionState.NO_REPLICA:
                continue
            try:
                active.count_fault()
                if active.window is None or active.window.ready() or active.faults > MAX_FAULTS:
                    self.fail(active, "internal error while decoding")
                else:
                    self._restart(active)
            except Exception:
                log.exception("%s: the session cannot be restarted", active.session.request.name_in_logs)
                self.fail(active, "internal error while decoding")
        self._send()

    def _turn(self) -> None:
        """Receive, admit, verify, commit, send."""
        self._receive()
        self._admit()
        windows = self._prompts.emit_scores(self._exchange.advance(), self._next_window)
        while windows:
            windows = self._commit(windows, self._verifier.verify(windows))
        self._send()

    def _receive(self) -> None:
        """Take in the replies that arrived since the last turn."""
        messages, self._inbox = self._inbox, []
        for fault in self._exchange.receive(messages):
            self._fault_handler.handle(fault)

    def _send(self) -> None:
        self._exchange.request()
        self._pool.flush()
        self._fill_masks(self._exchange.take_begun())

    @staticmethod
    def _fill_masks(windows: Sequence[VerificationWindow]) -> None:
        """Compute what grammars allow behind windows whose rows were just requested, while the models compute these."""
        wanted: dict[Role, list[tuple[GrammarMatcher, Sequence[int]]]] = {}
        for window in windows:
            grammar = window.active.session.grammar
            if grammar is not None and window.rows and not window.scores_prompt:
                wanted.setdefault(window.active.primary, []).append(
                    (grammar, window.draft_tokens[window.active.primary])
                )
        for of_vocabulary in wanted.values():
            fill_masks(of_vocabulary)

    def _admit(self) -> None:
        for active in self.admission.admit(lambda active: self._needed_roles(active, bool(active.alpha()))):
            self._active[active.key] = active
            active.session.count_queued(time.monotonic() - active.state_since)
            self._exchange.admit(active)
            self._next_window(active)

    def _next_window(self, active: ActiveSession) -> None:
        """Begin the session's next window, or wait for a replica, or end the session where positions are used up."""
        session = active.session
        guided = bool(active.alpha())
        roles = self._needed_roles(active, guided)
        unbound = [role for role in roles if role not in active.replicas]
        if unbound and not all([self._bind(active, role) for role in unbound]):
            active.enter(SessionState.NO_REPLICA)
            return
        active.begin()
        if active.prompt_scoring is not None:
            if not self._prompts.begin_chunk(active, active.prompt_scoring):
                self._next_window(active)
            return
        if session.request.only_prompt or len(session.primary) >= active.limit(active.primary):
            self.finish(active, "length")
            return
        # The primary needs one position for the new token; a small model does not, because its last row is enough.
        room = min([active.room(role) - (role == active.primary) for role in roles])
        if guided and room < 0:
            if self._config.beyond_context == "error":
                self.finish(active, "length")
                return
            active.stop_guidance()
            guided, roles = False, (active.primary,)
            room = active.room(active.primary) - 1
        active.expect_rows()
        plan = self.planner.plan(active, guided, room, len(self._active))
        self._exchange.begin(active, guided, plan.text_drafts, plan.guider_drafts, plan.to_hide, plan.source)
        if not guided and session.generated:
            self._read_ahead(active, GUIDED[1:] if active.alpha(LEAD_TOKENS) else roles[1:])

    def _needed_roles(self, active: ActiveSession, guided: bool) -> tuple[Role, ...]:
        """Roles that take part in the session's next window."""
        if active.prompt_scoring is not None:
            return active.prompt_scoring.roles
        if guided:
            return GUIDED
        drafted = self.planner.drafter(active, guided=False) == "guider"
        return (active.primary, "guider") if drafted else (active.primary,)

    def _read_ahead(self, active: ActiveSession, roles: Sequence[Role]) -> None:
        """Extend small models that take part soon, so that they need not catch up then."""
        for role in roles:
            if (active.window is None or role != active.window.drafting_role) and self._bind(active, role):
                if active.room(role) >= 0:
                    self._exchange.extend_ahead(active, role)

    def _bind(self, active: ActiveSession, role: Role) -> bool:
        """Bind the session to a replica of the role. Returns False if none is connected."""
        replica = active.replicas.get(role) or self._pool.pick(role)
        if replica is None:
            return False
        if role not in active.replicas:
            self.meter.resent(role, active.session.streams[role].held)  # if it was bound to another replica before
            active.bind(role, replica)
        return True

    def _commit(
        self, windows: Sequence[VerificationWindow], decisions: Sequence[Sequence[RowDecision]]
    ) -> list[VerificationWindow]:
        """Commit the tokens of decided rows. Returns the windows whose next row is complete but not decided yet."""
        return [window for window, rows in zip(windows, decisions, strict=True) if self._commit_rows(window, rows)]

    def _commit_rows(self, window: VerificationWindow, row_decisions: Sequence[RowDecision]) -> bool:
        """Commit the tokens of a window's decided rows, in order. True if the next row is complete but not decided."""
        active = window.active
        for number, one in enumerate(row_decisions):
            if number and (one.alpha, one.in_grammar) != (active.alpha(), active.session.grammar is not None):
                return True  # thinking has just ended, and alpha changed or a grammar began: decide the row again
            row = window.rows[window.next]
            verdict = self._verifier.verdict(row, one)
            if isinstance(verdict, NeedsWiderTopK):
                self._exchange.widen(row, verdict.k)
                return False
            if isinstance(verdict, NoLegalToken):
                self.fail(active, verdict.error)
                return False
            if isinstance(verdict, NeedsLegalLogits):
                self._exchange.look_up(row, verdict.ids)
                return False
            drafted = window.equals_draft(row, verdict.token)
            try:
                part = active.session.commit(verdict.token, one.alpha, verdict.changed, drafted, verdict.scores)
            except GrammarError as error:
                self.fail(active, str(error))
                return False
            active.events.emit(part)
            active.reset_faults()
            window.advance()
            if active.over or not window.goes_on():
                self._close(window)
                return False
        return window.ready()

    def _close(self, window: VerificationWindow) -> None:
        """End a window: update the draft planner, then end the session or begin its next window."""
        active = window.active
        self.planner.learn(window)
        if window.drafts or window.drafting_role is not None:
            window.settle()
        self._exchange.drop(active)
        if active.over:
            self._end(active)
        else:
            self._next_window(active)

    # -- faults ------------------------------------------------------------------------------------------------

    def _take_message(self, replica: Replica, message: Message) -> None:
        if isinstance(message, Rows | Drafted):
            replica.note_progress()
        self._inbox.append((replica, message))
        self.wake()

    def _restart_sessions_of_lost_replica(self, replica: Replica) -> None:
        """Restart the windows of a lost replica's sessions, with another replica or once it has restarted."""
        for active in list(self._active.values()):
            lost = [role for role, bound in active.replicas.items() if bound is replica]
            for role in lost:
                del active.replicas[role]
            if lost and active.state != SessionState.NO_REPLICA:
                self._continue(active, self._restart)
        self.wake()

    def _move_sessions_to_staying_replicas(self) -> None:
        """Replicas were found or are stopping: move sessions off stopping ones, and let waiting sessions go on."""
        for active in list(self._active.values()):
            leaving = [role for role, bound in active.replicas.items() if bound.endpoint.stopping]
            moving = [role for role in leaving if self._pool.has_staying_replica(role)]
            for role in moving:
                active.replicas.pop(role).outbox.released.append(active.key)
            if active.state == SessionState.NO_REPLICA:
                self._continue(active, self._next_window)
            elif moving:
                self._continue(active, self._restart)
        self.wake()

    def _continue(self, active: ActiveSession, step: Callable[[ActiveSession], None]) -> None:
        """Run a session's step outside a turn. A bug that it meets ends this session, and no other."""
        try:
            step(active)
        except Exception:
            log.exception("%s: the session cannot continue", active.session.request.name_in_logs)
            self.fail(active, "internal error while decoding")

    def _restart(self, active: ActiveSession) -> None:
        """Drop the window and begin another."""
        self._exchange.drop(active)
        self._next_window(active)

    def begin_anew(self, active: ActiveSession) -> None:
        """Restart a session outside a turn, after a fault of this program."""
        self._continue(active, self._restart)
        self.wake()

    async def _check_deadlines(self) -> None:
        """Check every wait against its deadline, every TICK_S."""
        while True:
            await asyncio.sleep(TICK_S)
            now, limits = time.monotonic(), self._config.deadlines
            for active in [each for each in self._active.values() if each.state == SessionState.NO_REPLICA]:
                if now - active.state_since > limits.reconnect_timeout_s:
                    away = ", ".join(self.missing_roles())
                    self.fail(active, f"no replica of {away} came back within {limits.reconnect_timeout_s:g} s")
            self._fault_handler.check_rows(list(self._active.values()))
            self.admission.tick()
            if self.admission or self.parked:
                self.wake()

    def is_admitted(self, active: ActiveSession) -> bool:
        """True from admission to the end of the session."""
        return active.state not in (SessionState.QUEUED, SessionState.FINISHED)

    def fail(self, active: ActiveSession, error: str) -> None:
        """End a session with an error. error: a sentence that the client reads."""
        self.finish(active, "error", error)

    def finish(self, active: ActiveSession, reason: FinishReason, error: str | None = None) -> None:
        """End a session early, for a reason other than its own last token."""
        if not active.over:
            active.events.emit(active.session.finish(reason))
            self._end(active, error)

    def _end(self, active: ActiveSession, error: str | None = None) -> None:
        session = active.session
        assert session.finish_reason is not None
        active.events.emit(Finished(session.finish_reason, session.usage(), session.stop_reason, error))
        self.release(active)
