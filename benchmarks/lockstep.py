"""Guided decoding without sockets: the coordinator's exchange and decisions, and models that answer at once.

Everything that is said passes through the wire's own messages, so its bytes are those of the service. Sessions go in
step, and every row can be held against the whole rows that it was decided from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from actors.api.generation import Generate, Role
from actors.config import ServiceConfig
from actors.coordinator.draft_planner import Planner
from actors.coordinator.exchange import Exchange
from actors.coordinator.replica_pool import Replica
from actors.coordinator.session import Live, Window
from actors.coordinator.verification import Chosen, Decider, Judged, Wider
from actors.decoding.arithmetic import Floats
from actors.decoding.decision import Decisions
from actors.decoding.session import Session
from actors.directory import Endpoint
from actors.replica.engine_thread import Engine, run_forward
from actors.replica.leases import Ledger
from actors.replica.lookups import RowDesk
from actors.replica.scheduler import Part, Pending
from actors.text.tokenizer import RoleTokenizer
from actors.text.vocabularies import Languages
from actors.wire.columns import extend_items
from actors.wire.framing import HEADER, MAC_BYTES
from actors.wire.link import Limits
from actors.wire.messages import Extend, Lookup, Message, Welcome, Widen, decode, encode
from actors.wire.replies import Answer, Replies

_ORDER: tuple[Role, ...] = ("guider", "guider_base", "target")  # the small models answer first


class StandIn:
    """A model replica that answers at once. bytes: of all frames in both directions, framing included."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._replies = Replies(Limits().frame, engine.width)
        self._desk = RowDesk(engine, Ledger(), self._replies, wait_s=0.0)
        self._outgoing: list[Message] = []
        self.bytes = 0

    def send(self, *messages: Message) -> None:
        """What the engine's side says (`actors.wire.replies.Recipient`)."""
        self._outgoing += map(self._carried, messages)

    def answer(self, messages: Sequence[Message]) -> list[Message]:
        """The replies to what a coordinator says."""
        for message in map(self._carried, messages):
            match message:
                case Extend():
                    self._extend(message)
                case Lookup():
                    self._desk.look_up(self, message)
                case Widen():
                    self._desk.widen(self, message)
            self._replies.flush()
        replies, self._outgoing = self._outgoing, []
        return replies

    def _carried(self, message: Message) -> Message:
        body = encode(message)
        self.bytes += HEADER.size + len(body) + MAC_BYTES
        return decode(body)

    def _extend(self, message: Extend) -> None:
        parts = [Part(Pending(self, item, item.prefix), len(item.tokens)) for item in extend_items(message)]
        results = run_forward(self._engine, parts, message.released.tolist())
        for part, result in zip(parts, results, strict=True):
            assert isinstance(result, Answer), result
            self._replies.rows(self, part.pending.item.ticket, [result])


class _Neighbour(Replica):
    """A replica that is reached without a connection."""

    def __init__(self, role: Role, engine: Engine) -> None:
        super().__init__(Endpoint(role, "", 0, incarnation=role))
        cache = engine.cache_stats().tokens_total
        self._welcome = Welcome(role, role, engine.width, engine.hash_seed, cache, cache, engine.exact)

    @property
    def welcome(self) -> Welcome:
        return self._welcome


@dataclass(frozen=True, slots=True)
class Step:
    """What became of one row: decided from slices of k alone, and after all widening; both are batches of one row."""

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
        self._languages = Languages(tokenizers)
        self._exchange = Exchange(config.exchange, self._languages)
        self._decider = Decider(config.exchange)
        self._planner = Planner(config.speculation)
        self._stand_ins = {role: StandIn(engine) for role, engine in engines.items()}
        self._replicas = {role: _Neighbour(role, engine) for role, engine in engines.items()}
        self._sessions = 0

    def open(self, request: Generate) -> Live:
        """A session that has not decoded anything yet."""
        roles = tuple(request.prompts)
        language = self._languages.language(request.primary, roles, request.thinking)
        self._sessions += 1
        seeds = {role: self._engines[role].hash_seed for role in roles}
        session = Session(request, language, seeds)
        live = Live(session, self._sessions, self._sessions, self._planner.acceptance())
        live.replicas.update((role, self._replicas[role]) for role in roles)
        return live

    def step(self, live: Live) -> Step:
        """Decode one token of a session."""
        before = self._bytes()
        self._exchange.begin(live, guided=True)
        self._settle()
        assert live.window is not None
        (row,) = live.window.rows
        narrow = final = self._judge(live.window)
        narrow_bytes = self._bytes() - before
        verdict = self._decider.verdict(row, final)
        while isinstance(verdict, Wider):
            self._exchange.widen(row, verdict.k)
            self._settle()
            final = self._judge(live.window)
            verdict = self._decider.verdict(row, final)
        assert isinstance(verdict, Chosen), verdict
        sizes = narrow_bytes, self._bytes() - before
        return Step(narrow.decisions, final.decisions, verdict, final is not narrow, *sizes)

    def _judge(self, window: Window) -> Judged:
        ((judged,),) = self._decider.judge([window])
        return judged

    def commit(self, live: Live, step: Step) -> None:
        """Take a step's token."""
        assert live.window is not None
        live.session.commit(step.chosen.token, live.alpha(), step.chosen.changed)
        live.window.settle()
        self._exchange.drop(live)

    def close(self, live: Live) -> None:
        """Forget a session at the models."""
        for role in live.replicas:
            self._engines[role].close(live.key)

    def whole(self, live: Live) -> Floats:
        """[primary width]: the combined logits of the row that is held, by plain arithmetic on whole rows."""
        primary = live.primary
        rows = {role: self._read(live, role) for role in self._engines}
        with np.errstate(invalid="ignore"):
            delta = rows["guider"] - rows["guider_base"]
        combined = rows[primary] + live.alpha() * delta
        assert not np.isnan(delta[~np.isnan(rows[primary])]).any(), "the roles' vocabularies are the same here"
        return np.where(np.isnan(combined), -np.inf, combined)

    def _read(self, live: Live, role: Role) -> Floats:
        """[primary width]: a role's held row at the primary's ids, NaN where it has none."""
        mapping = self._languages.plain_map(live.primary, role)
        row = self._engines[role].whole([live.key])[-1].astype(np.float64)
        theirs = mapping.to_role
        own = np.where(theirs >= 0, row[np.maximum(theirs, 0)], np.nan)
        for event, ids in mapping.folds.items():
            own[event] = np.logaddexp.reduce(row[list(ids)])
        return own

    def _settle(self) -> None:
        """Carry messages until the row in flight is complete."""
        while True:
            silent = True
            for role in _ORDER:
                replica = self._replicas[role]
                messages = replica.outbox.take(replica.welcome.width)
                silent = silent and not messages
                answers = self._stand_ins[role].answer(messages)
                faults = self._exchange.absorb((replica, answer) for answer in answers)
                assert not faults, faults
                self._exchange.advance()
            if silent:
                return

    def _bytes(self) -> int:
        return sum(stand_in.bytes for stand_in in self._stand_ins.values())
