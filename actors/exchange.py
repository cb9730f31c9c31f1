"""Carries rows: extends the models, completes the candidates by lookups, widens rows, for many sessions at once.

Of target and guider, the one that answers first has its ids looked up in the other, which still computes (a lookup
waits for its row); when both have answered, every role is asked for the candidates that it lacks. A row's candidates
are the same in any order of arrival.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from actors.config import Exchange as ExchangeConfig
from actors.decoding.candidates import Ids, Lookup, Part, join
from actors.decoding.vocabulary import Known, VocabularyMap
from actors.languages import Languages
from actors.live import Live
from actors.requests import Role
from actors.wire.messages import WHOLE, Message, Refusal, Refused, Rows, Values

PROPOSERS: tuple[Role, ...] = ("target", "guider")  # the guider base only answers for what these put forward


@dataclass(frozen=True, slots=True)
class Asked:
    """An item on its way to a model, found again by its ticket."""

    kind: Literal["extend", "lookup", "widen"]
    live: Live
    role: Role
    known: Known | None = None  # of an extend
    length: int = 0  # of the stream when an extend was sent
    lookup: Lookup | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """An item that a model refused."""

    live: Live
    role: Role
    code: Refusal
    detail: int

    def pause(self) -> float:
        """Seconds to wait before asking again, with jitter; a cache that is gone is filled at once, if not often."""
        misses = self.live.misses
        pauses: dict[Refusal, float] = {
            Refusal.FULL: self.detail / 1000,
            Refusal.FAILED: min(2.0, 0.05 * 2.0**self.live.faults),
            Refusal.KV_MISS: min(1.0, 0.01 * 2.0 ** min(misses, 10)) if misses > 2 else 0.0,
        }
        return pauses.get(self.code, 0.0) * random.uniform(0.5, 1.0)


class Exchange:
    """The rows in flight of one coordinator."""

    def __init__(self, config: ExchangeConfig, languages: Languages) -> None:
        self._config, self._languages = config, languages
        self._ticket = itertools.count(1)
        self._asked: dict[int, Asked] = {}
        self._touched: dict[int, Live] = {}

    def begin(self, live: Live, alpha: float) -> None:
        """Start the session's next row: extend every role that it needs. Their replicas are bound."""
        live.alpha, live.audited, live.ids = alpha, None, None
        live.k = WHOLE if self._config.mode == "full" else self._config.k
        roles: Sequence[Role] = ("target", "guider", "guider_base") if alpha else (live.primary,)
        live.parts = {}
        for role in roles:
            self._extend(live, role)

    def again(self, live: Live, role: Role, held: int) -> None:
        """Ask one role for its part of the row anew, from what its replica holds."""
        self._forget(live, role)
        stream = live.session.streams[role]
        stream.held = min(held, len(stream) - 1)
        live.ids = None
        self._extend(live, role)
        self._touched[live.key] = live

    def widen(self, live: Live, k: int) -> None:
        """Ask for wider slices of the row in flight (WHOLE: for whole rows of every role)."""
        live.k, live.ids = k, None
        for role, part in live.parts.items():
            if role in PROPOSERS or role == live.primary or k == WHOLE:
                position, row = self._row(live, role)
                ticket = self._ticketed(Asked("widen", live, role))
                live.replicas[role].outbox.widens.append((ticket, live.key, row, live.epoch, position, k))
                part.arrived = False

    def drop(self, live: Live) -> None:
        """The session is over, or starts its row anew: forget what was asked for it."""
        for role in list(live.tickets):
            self._forget(live, role)
        live.parts, live.ids = {}, None
        self._touched.pop(live.key, None)

    def absorb(self, messages: Iterable[Message]) -> list[Fault]:
        """Take in replies. Returns what was refused; answers that nobody waits for any more are ignored."""
        faults: list[Fault] = []
        for message in messages:
            if isinstance(message, Rows):
                self._take_rows(message)
            elif isinstance(message, Values):
                self._take_values(message)
            elif isinstance(message, Refused):
                faults += self._take_refused(message)
        return faults

    def advance(self) -> list[Live]:
        """Ask for what the rows touched since the last call still lack; returns those that are complete."""
        touched, self._touched = list(self._touched.values()), {}
        joining: list[Live] = []
        for live in touched:
            if live.ids is None and live.parts:
                parts = self._proposing(live)
                if all(part.arrived for part in parts):
                    joining.append(live)
                elif live.k == self._config.k and live.alpha:
                    self._ask_early(live)
        if joining:
            self._join(joining)
        return [live for live in touched if live.complete]

    def _proposing(self, live: Live) -> list[Part]:
        """The parts without which the row's candidates are not known."""
        if live.alpha and live.k != WHOLE:
            return [live.parts[role] for role in PROPOSERS]
        return list(live.parts.values())

    def _join(self, lives: list[Live]) -> None:
        """The candidates of these rows are known: ask every role for those that it lacks."""
        for live, ids in zip(lives, join([list(live.parts.values()) for live in lives]), strict=True):
            live.ids = ids
            if live.alpha and live.k != WHOLE:
                for role, part in live.parts.items():
                    places = part.missing(len(ids))
                    if len(places):
                        self._lookup(live, role, Lookup(ids[places], places))

    def _ask_early(self, live: Live) -> None:
        """One of target and guider has answered: look its ids up in the other, once."""
        target, guider = (live.parts[role] for role in PROPOSERS)
        for role, asked, proposer in zip(PROPOSERS, (target, guider), (guider, target), strict=True):
            if proposer.arrived and not asked.arrived and not asked.lookups:  # else it is asked already
                wanted = proposer.ids >= 0
                for event in asked.events:
                    wanted &= proposer.ids != event
                self._lookup(live, role, Lookup(proposer.ids[wanted]))

    def _lookup(self, live: Live, role: Role, lookup: Lookup) -> None:
        """Ask for what the role has of these ids."""
        theirs = self._map(live, role).to_role[lookup.ids]
        if len(theirs) and theirs.min() < 0:
            there = theirs >= 0
            theirs, lookup.ids = theirs[there], lookup.ids[there]
            lookup.places = lookup.places[there] if lookup.places is not None else None
        if not len(theirs):
            return
        part = live.parts[role]
        part.lookups.append(lookup)
        part.waiting += 1
        position, row = self._row(live, role)
        ticket = self._ticketed(Asked("lookup", live, role, lookup=lookup))
        outbox = live.replicas[role].outbox
        outbox.lookups.append((ticket, live.key, row, live.epoch, position, len(theirs)))
        outbox.ids.append(theirs)

    def _extend(self, live: Live, role: Role) -> None:
        stream = live.session.streams[role]
        position = min(stream.held, len(stream) - 1)
        needed = self._known_of(live, role)
        live.parts[role] = Part(events=needed.events)
        k = 0 if role == "guider_base" and live.primary != role and live.k != WHOLE else live.k
        ticket = self._ticketed(Asked("extend", live, role, known=needed, length=len(stream)))
        outbox = live.replicas[role].outbox
        count = len(stream) - position
        prefix = stream.hash_before(position)
        item = (ticket, live.key, live.age, prefix, live.epoch, position, count, 1, k, len(needed.ids))
        outbox.extends.append(item)
        outbox.tokens += stream.tokens[position:]
        outbox.know.append(needed.ids)

    def _take_rows(self, message: Rows) -> None:
        first_id = first_logit = first_value = 0
        for row, (ticket, _, k, know) in enumerate(message.items.tolist()):
            asked = self._asked.get(ticket)
            width = self._width(message) if k == WHOLE else k
            ids = message.ids[first_id : first_id + max(k, 0)]
            logits = message.logits[first_logit : first_logit + width]
            values = message.known[first_value : first_value + know]
            first_id, first_logit, first_value = first_id + len(ids), first_logit + width, first_value + know
            if asked is not None:
                self._done(ticket, asked)
                self._take_row(asked, ids, logits, values, float(message.logsumexp[row]), k == WHOLE)

    @staticmethod
    def _width(message: Rows) -> int:
        """Logits of a whole row in this frame: all that the slices leave, shared evenly."""
        k, whole = message.items["k"], message.items["k"] == WHOLE
        return int((len(message.logits) - k[~whole].sum()) // whole.sum())

    def _take_row(self, asked: Asked, ids: Ids, logits: Any, values: Any, logsumexp: float, whole: bool) -> None:
        to_primary = self._map(asked.live, asked.role).to_primary
        part = asked.live.parts[asked.role]
        ours = to_primary[: len(logits)] if whole else to_primary[ids]
        if asked.kind == "widen":
            part.widen(ours, logits)
            part.arrived = True
        else:
            assert asked.known is not None
            folded = asked.known.fold(values[None])[0] if len(values) else np.zeros(0)
            part.arrive(folded, ours, logits, logsumexp)
            asked.live.session.streams[asked.role].held = asked.length

    def _take_values(self, message: Values) -> None:
        begin = 0
        for ticket, count in message.items.tolist():
            asked = self._asked.get(ticket)
            if asked is not None:
                self._done(ticket, asked)
                asked.live.parts[asked.role].waiting -= 1
                assert asked.lookup is not None
                asked.lookup.values = message.values[begin : begin + count]
            begin += count

    def _take_refused(self, message: Refused) -> list[Fault]:
        faults: dict[tuple[int, Role], Fault] = {}
        for ticket, code, detail in message.items.tolist():
            asked = self._asked.get(ticket)
            if asked is not None:
                self._done(ticket, asked)
                # An extend's refusal says more than those of the lookups that waited for it.
                if asked.kind == "extend" or (asked.live.key, asked.role) not in faults:
                    faults[asked.live.key, asked.role] = Fault(asked.live, asked.role, Refusal(code), detail)
        return list(faults.values())

    def _done(self, ticket: int, asked: Asked) -> None:
        del self._asked[ticket]
        asked.live.tickets[asked.role].discard(ticket)
        self._touched[asked.live.key] = asked.live

    def _ticketed(self, asked: Asked) -> int:
        ticket = next(self._ticket)
        self._asked[ticket] = asked
        asked.live.tickets.setdefault(asked.role, set()).add(ticket)
        return ticket

    def _forget(self, live: Live, role: Role) -> None:
        for ticket in live.tickets.pop(role, ()):
            self._asked.pop(ticket, None)

    def _row(self, live: Live, role: Role) -> tuple[int, int]:
        """What names the row in flight to a replica: the position of its token, and the hash up to it."""
        stream = live.session.streams[role]
        return len(stream) - 1, stream.hash_before(len(stream))

    def _map(self, live: Live, role: Role) -> VocabularyMap:
        return self._languages.map(live.primary, role)

    def _known_of(self, live: Live, role: Role) -> Known:
        forced = tuple(sorted(live.session.must_know() & self._languages.legal(live.primary)))
        return self._languages.known(live.primary, role, live.session.request.thinking.end, forced)
