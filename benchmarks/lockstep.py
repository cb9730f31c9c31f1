"""Guided decoding without sockets: the coordinator's exchange and verification, and replicas that answer at once.

Requests and replies are encoded as on the wire, so their bytes are those of the service. Sessions decode in lockstep,
and every row can be compared with the whole rows from which it was decided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from actors.api.generation import Generate, Role
from actors.config import ServiceConfig
from actors.coordinator.draft_planner import DraftPlanner
from actors.coordinator.exchange import Exchange
from actors.coordinator.replica_pool import Replica
from actors.coordinator.session import ActiveSession, VerificationWindow
from actors.coordinator.verification import Chosen, NeedsWiderTopK, RowDecision, Verifier
from actors.decoding.candidates import Floats
from actors.decoding.decision import Decisions
from actors.decoding.session import Session
from actors.directory import Endpoint
from actors.replica.answers import Answer
from actors.replica.engine_thread import Engine, run_forward
from actors.replica.leases import SessionLeases
from actors.replica.lookups import LookupService
from actors.replica.scheduler import Chunk, ScheduledExtend
from actors.text.tokenizer import RoleTokenizer
from actors.text.vocabularies import VocabularyRegistry
from actors.wire.columns import extend_items
from actors.wire.framing import HEADER, MAC_BYTES
from actors.wire.link import Limits
from actors.wire.messages import WHOLE, Extend, Lookup, Message, Welcome, Widen, decode, encode
from actors.wire.replies import Replies

_ORDER: tuple[Role, ...] = ("guider", "guider_base", "target")  # the small models answer first


class StandIn:
    """A model replica that answers at once. bytes: size of all frames in both directions, framing included."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._replies = Replies(Limits().frame, engine.width)
        self._lookups = LookupService(engine, SessionLeases(), self._replies, wait_s=0.0)
        self._outgoing: list[Message] = []
        self.bytes = 0

    def send(self, *messages: Message) -> None:
        """Collect the replica's replies (`actors.wire.replies.Recipient`)."""
        self._outgoing += map(self._carried, messages)

    def answer(self, messages: Sequence[Message]) -> list[Message]:
        """Replies to a coordinator's messages."""
        for message in map(self._carried, messages):
            match message:
                case Extend():
                    self._extend(message)
                case Lookup():
                    self._lookups.look_up(self, message)
                case Widen():
                    self._lookups.widen(self, message)
            self._replies.flush()
        replies, self._outgoing = self._outgoing, []
        return replies

    def _carried(self, message: Message) -> Message:
        body = encode(message)
        self.bytes += HEADER.size + len(body) + MAC_BYTES
        return decode(body)

    def _extend(self, message: Extend) -> None:
        parts = [Chunk(ScheduledExtend(self, item), len(item.tokens)) for item in extend_items(message)]
        for result in run_forward(self._engine, parts, message.released.tolist()):
            assert isinstance(result, Answer), result
            self._replies.rows(self, result.answered, result.place)


class _Neighbour(Replica):
    """A replica without a connection."""

    def __init__(self, role: Role, engine: Engine) -> None:
        super().__init__(Endpoint(role, "", 0, incarnation=role))
        cache = engine.cache_stats().tokens_total
        self._welcome = Welcome(role, role, engine.width, engine.hash_seed, cache, cache, engine.batch_invariant, "")

    @property
    def welcome(self) -> Welcome:
        return self._welcome


@dataclass(frozen=True, slots=True)
class Step:
    """Decisions of one row, from slices of k alone and after all widening; both are batches of one row."""

    narrow: Decisions
    final: Decisions
    chosen: Chosen
    widened: bool
    narrow_bytes: int
    final_bytes: int


class Lockstep:
    """Sessions that decode one token at a time, each with the same engines."""

    def __init__(
        self, config: ServiceConfig, tokenizers: Mapping[Role, RoleTokenizer], engines: Mapping[Role, Engine]
    ) -> None:
        self._engines = engines
        self._vocabularies = VocabularyRegistry(tokenizers)
        self._exchange = Exchange(config.exchange, self._vocabularies)
        self._verifier = Verifier(config.exchange)
        self._planner = DraftPlanner(config.speculation)
        self._stand_ins = {role: StandIn(engine) for role, engine in engines.items()}
        self._replicas = {role: _Neighbour(role, engine) for role, engine in engines.items()}
        self._sessions = 0

    def open(self, request: Generate) -> ActiveSession:
        """A session that has not decoded anything yet."""
        roles = tuple(request.prompts)
        vocabulary = self._vocabularies.vocabulary(request.primary, roles, request.thinking)
        self._sessions += 1
        seeds = {role: self._engines[role].hash_seed for role in roles}
        session = Session(request, vocabulary, seeds)
        active = ActiveSession(session, self._sessions, self._sessions, self._planner.acceptance())
        active.replicas.update((role, self._replicas[role]) for role in roles)
        self._exchange.admit(active)
        return active

    def step(self, active: ActiveSession) -> Step:
        """Decode one token of a session."""
        before = self._bytes()
        self._exchange.begin(active, guided=bool(active.alpha()))
        self._settle()
        assert active.window is not None
        (row,) = active.window.rows
        narrow = final = self._judge(active.window)
        narrow_bytes = self._bytes() - before
        verdict = self._verifier.verdict(row, final)
        while isinstance(verdict, NeedsWiderTopK):
            self._exchange.widen(row, verdict.k)
            self._settle()
            final = self._judge(active.window)
            verdict = self._verifier.verdict(row, final)
        assert isinstance(verdict, Chosen), verdict
        sizes = narrow_bytes, self._bytes() - before
        return Step(narrow.rows.decisions, final.rows.decisions, verdict, final is not narrow, *sizes)

    def _judge(self, window: VerificationWindow) -> RowDecision:
        ((row_decisions,),) = self._verifier.verify([window])
        return row_decisions

    def commit(self, active: ActiveSession, step: Step) -> None:
        """Commit the token of a step."""
        assert active.window is not None
        active.session.commit(step.chosen.token, active.alpha(), step.chosen.changed)
        active.window.settle()
        self._exchange.drop(active)

    def whole_decisions(self, active: ActiveSession) -> Decisions:
        """The decisions of the held row from whole rows, before its step is committed."""
        assert active.window is not None
        (row,) = active.window.rows
        if row.k != WHOLE:
            self._exchange.widen(row, WHOLE)
            self._settle()
        return self._judge(active.window).rows.decisions

    def close(self, active: ActiveSession) -> None:
        """Forget a session, here and at the models."""
        self._exchange.release(active)
        for role in active.replicas:
            self._engines[role].close(active.key)

    def whole(self, active: ActiveSession) -> Floats:
        """Combined logits [primary width] of the held row, computed from whole rows."""
        primary = active.primary
        rows = {role: self._read(active, role) for role in self._engines}
        with np.errstate(invalid="ignore"):
            delta = rows["guider"] - rows["guider_base"]
        combined = rows[primary] + active.alpha() * delta
        assert not np.isnan(delta[~np.isnan(rows[primary])]).any(), "the roles' vocabularies are the same here"
        return np.where(np.isnan(combined), -np.inf, combined)

    def _read(self, active: ActiveSession, role: Role) -> Floats:
        """A role's held row [primary width] at the primary's ids; NaN where the role has no such id."""
        mapping = self._vocabularies.plain_map(active.primary, role)
        row = self._engines[role].whole([active.key])[-1].astype(np.float64)
        theirs = mapping.to_role
        own = np.where(theirs >= 0, row[np.maximum(theirs, 0)], np.nan)
        for event, ids in mapping.folds.items():
            own[event] = np.logaddexp.reduce(row[list(ids)])
        return own

    def _settle(self) -> None:
        """Deliver messages until the row in flight is complete."""
        while True:
            self._exchange.request()
            silent = True
            for role in _ORDER:
                replica = self._replicas[role]
                messages = replica.outbox.take(replica.welcome.width)
                silent = silent and not messages
                answers = self._stand_ins[role].answer(messages)
                faults = self._exchange.receive((replica, answer) for answer in answers)
                assert not faults, faults
                self._exchange.advance()
            if silent:
                return

    def _bytes(self) -> int:
        return sum(stand_in.bytes for stand_in in self._stand_ins.values())
