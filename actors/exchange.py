"""Carries rows: extends the models, completes the candidates by lookups, widens rows, for many sessions at once.

The small models usually answer first: the guider's ids are looked up in the target while it still computes (a lookup
waits for its row). When both have answered, every role is asked for the candidates that it lacks. A row's candidates
are the same in any order of arrival. What rows of one shape need is done for all of them at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from actors.asked import Asked, Fault, Lookups
from actors.config import Exchange as ExchangeConfig
from actors.decoding.candidates import Ids, Slice, blocks
from actors.decoding.hashing import extend_hashes
from actors.decoding.vocabulary import Known, VocabularyMap
from actors.languages import Languages
from actors.links import Replica
from actors.live import Live
from actors.readrows import read_rows
from actors.requests import Role
from actors.window import Early, Row, Window
from actors.wire.columns import drafted_items
from actors.wire.messages import WHOLE, Drafted, Message, Refusal, Refused, Rows, Values

GUIDED: tuple[Role, ...] = ("target", "guider", "guider_base")  # the base only answers for what the others put forward


class Exchange:
    """The rows in flight of one coordinator."""

    def __init__(self, config: ExchangeConfig, languages: Languages) -> None:
        self._config, self._languages = config, languages
        self._ticket = itertools.count(1)
        self._asked: dict[int, Asked] = {}
        self._touched: dict[Row, None] = {}

    # -- asking --------------------------------------------------------------------------------------------------

    def begin(self, live: Live, guided: bool, guesses: Sequence[int] = (), drafts: int = 0) -> None:
        """Start the session's next window; the replicas that it needs are bound.

        guesses: drafts that are known already, in the primary's ids. drafts: how many to ask of the guider instead.
        """
        known = self._known(live, guided)
        window = live.window = Window(live, guided, known, "guider" if drafts else None, drafts)
        if drafts:
            self._ask_drafts(window)
        else:
            self._check(window, guesses)

    def _known(self, live: Live, guided: bool) -> Mapping[Role, Known]:
        """What the rows of the session's next window must know, by role."""
        lifted = live.session.must_know()
        if not lifted and guided in live.known:
            return live.known[guided]
        forced = tuple(sorted(lifted & self._languages.legal(live.primary)))
        end, roles = live.session.request.thinking.end, GUIDED if guided else (live.primary,)
        known = {role: self._languages.known(live.primary, role, end, forced) for role in roles}
        if not lifted:
            live.known[guided] = known
        return known

    def again(self, live: Live, role: Role, held: int) -> None:
        """Ask one role for its part of the window anew, from what its replica holds."""
        window = live.window
        assert window is not None
        stream = live.session.streams[role]
        stream.held = min(held, stream.held, len(stream) - 1)
        self._forget(live, role)
        window.answered.discard(role)
        for row in window.rows[window.next :]:
            row.slices.pop(role, None)
            row.restart()
            self._touched[row] = None
        for other in window.roles:
            self._forget(live, other, lookups_only=True)
        self._extend(window, role)

    def read(self, live: Live, role: Role) -> None:
        """Let a role read what it will need later. Nobody waits for it: if it fails, the tokens are sent again."""
        stream = live.session.streams[role]
        if tokens := stream.tokens[stream.held :]:
            prefix, outbox = stream.hash_before(stream.held), live.replicas[role].outbox
            item = (next(self._ticket), live.key, live.age, prefix, live.epoch, stream.held, len(tokens), 0, 0, 0)
            outbox.extends.append(item)
            outbox.tokens += tokens
            stream.held = len(stream)

    def widen(self, row: Row, k: int) -> None:
        """Ask for wider slices of a row (WHOLE: for the whole row of every role)."""
        row.k = k
        row.restart()
        for role in row.window.roles:
            if self._too_narrow(row, role):
                self._widen(row, role, row.slices.pop(role))

    def drop(self, live: Live) -> None:
        """The session's window is over, or is started anew: forget what was asked for it."""
        for role in list(live.tickets):
            self._forget(live, role)
        if live.window is not None:
            for row in live.window.dissolve():
                self._touched.pop(row, None)
            live.window = None

    def _too_narrow(self, row: Row, role: Role) -> bool:
        """Whether the slice that an extend gives of a row is not what the row is decided by."""
        if row.k == self._width(row.window, row.window.live.primary):
            return False
        return row.k == WHOLE or not (role == "guider_base" and row.window.guided)

    def _widen(self, row: Row, role: Role, before: Slice) -> None:
        live = row.window.live
        position, prefix = row.name(role)
        ticket = self._ticketed(Asked("widen", row.window, role, row=row, before=before))
        live.replicas[role].outbox.widens.append((ticket, live.key, prefix, live.epoch, position, row.k))

    def _ask_drafts(self, window: Window) -> None:
        """Let the guider append the session's newest tokens and go on by itself."""
        live = window.live
        request, outbox = live.session.request, live.replicas["guider"].outbox
        stream = live.session.streams["guider"]
        window.first["guider"] = len(stream) - 1
        window.hashes["guider"] = [stream.hash_before(len(stream))]
        sampling = request.sampling
        at, noise = len(outbox.extends), len(live.session.primary)
        outbox.drafting.append((at, window.wanted, request.seed, noise, sampling.temperature, sampling.top_p))
        self._extend(window, "guider")

    def _check(self, window: Window, guesses: Sequence[int]) -> None:
        """The drafts are known: ask for the rows behind them."""
        k = WHOLE if self._config.mode == "full" else self._config.k
        window.rows = [Row(window, index, k) for index in range(len(guesses) + 1)]
        for role in window.roles:
            if role != window.drafter:
                stream = window.live.session.streams[role]
                theirs = self._map(window.live, role).to_role
                tail = window.tails[role] = [int(theirs[guess]) for guess in guesses]
                begun = stream.hash_before(len(stream))
                window.first[role] = len(stream) - 1
                window.hashes[role] = [begun, *extend_hashes(begun, tail)]
                self._extend(window, role)

    def _extend(self, window: Window, role: Role) -> None:
        """Send a role the session's newest tokens and the drafts behind them; ask for the window's rows."""
        live, needed, first = window.live, window.known.get(role), window.first[role]
        stream, tail = live.session.streams[role], window.tails.get(role, [])
        position = min(stream.held, first)
        tokens = [*stream.tokens[position : first + 1], *tail]
        k = self._width(window, role)
        ids = needed.ids if needed is not None else np.zeros(0, np.int32)
        rows = len(tail) + 1
        ticket = self._ticketed(Asked("extend", window, role, known=needed))
        prefix = stream.hash_before(position)
        outbox = live.replicas[role].outbox
        item = (ticket, live.key, live.age, prefix, live.epoch, position, len(tokens), rows, k, len(ids))
        outbox.extends.append(item)
        outbox.tokens += tokens
        outbox.know.append(ids)

    def _width(self, window: Window, role: Role) -> int:
        """Of the slices that a role is asked for."""
        if role not in window.known:
            return 0  # it only drafts
        if self._config.mode == "full":
            return WHOLE
        return 0 if role == "guider_base" and window.guided else self._config.k

    # -- answers -------------------------------------------------------------------------------------------------

    def absorb(self, messages: Iterable[tuple[Replica, Message]]) -> list[Fault]:
        """Take in replies. Returns what was refused; answers that nobody waits for any more are ignored."""
        faults: list[Fault] = []
        for replica, message in messages:
            if isinstance(message, Rows):
                self._take_rows(message, replica)
            elif isinstance(message, Values):
                self._take_values(message)
            elif isinstance(message, Drafted):
                self._take_drafts(message)
            elif isinstance(message, Refused):
                faults += self._take_refused(message)
        return faults

    def advance(self) -> list[Window]:
        """Ask for what the rows touched since the last call still lack; windows whose next row is complete."""
        touched, self._touched = list(self._touched), {}
        open_rows = [row for row in touched if row.block is None]
        joining = [row for row in open_rows if row.joinable]
        self._ask_early([row for row in open_rows if not row.joinable])
        self._join(joining)
        return [window for window in dict.fromkeys(row.window for row in touched) if window.ready()]

    def _take_rows(self, message: Rows, replica: Replica) -> None:
        replica.pace.observe(message.packed, message.micros / 1e6)
        asked = [self._asked.get(ticket) for ticket in message.items["ticket"].tolist()]
        for one, slices in read_rows(message, asked, replica.welcome.width, self._map):
            if one is None:
                continue
            self._done(one)
            window, role = one.window, one.role
            if one.kind == "widen":
                assert one.row is not None
                self._arrive(one.row, role, slices[0])
                continue
            window.answered.add(role)
            if role == window.drafter and not window.rows:
                self._check(window, [])  # it drafted nothing
            if role in window.known:
                for row, part in zip(window.rows, slices):  # noqa: B905  # drafts may have been cut
                    if row.index >= window.next and self._too_narrow(row, role):
                        self._widen(row, role, part)  # it had been widened when the role began anew
                    elif row.index >= window.next:
                        self._arrive(row, role, part)

    def _arrive(self, row: Row, role: Role, part: Slice) -> None:
        row.slices[role] = part
        if row.block is not None:
            row.block.arrive(role, row.at, part)
        self._touched[row] = None

    def _take_drafts(self, message: Drafted) -> None:
        for ticket, tokens in drafted_items(message):
            asked = self._asked.get(ticket)
            if asked is not None and not asked.window.rows:
                window = asked.window
                guesses = self._common(window, tokens)
                tail = window.tails["guider"] = tokens[: len(guesses)]
                window.hashes["guider"] += extend_hashes(window.hashes["guider"][0], tail)
                self._check(window, guesses)

    def _common(self, window: Window, tokens: Sequence[int]) -> list[int]:
        """The guider's drafts in the primary's ids, as far as each role that checks them reads them as one id."""
        live, guesses = window.live, list[int]()
        to_primary = self._map(live, "guider").to_primary
        checkers = [self._map(live, role).to_role for role in window.roles if role != "guider"]
        for token in tokens:
            guess = int(to_primary[token])
            if guess < 0 or any(theirs[guess] < 0 for theirs in checkers):
                break
            guesses.append(guess)
        return guesses

    def _take_values(self, message: Values) -> None:
        tickets, counts = message.items["ticket"].tolist(), message.items["values"].tolist()
        asked = self._asked.get(tickets[0]) if tickets else None
        if asked is not None and asked.lookups is not None and asked.lookups.tickets == tickets:
            asked.lookups.take(message.values)
            for ticket in tickets:
                if (one := self._asked.get(ticket)) is not None:
                    self._done(one)
            return
        begin = 0
        for ticket, count in zip(tickets, counts, strict=True):
            if (one := self._asked.get(ticket)) is not None and one.lookups is not None:
                one.lookups.take(message.values[begin : begin + count], ticket)
                self._done(one)
            begin += count

    def _take_refused(self, message: Refused) -> list[Fault]:
        faults: dict[tuple[int, Role], Fault] = {}
        for ticket, code, detail in message.items.tolist():
            if (asked := self._asked.get(ticket)) is not None:
                self._done(asked)
                # An extend's refusal says more than those of the lookups that waited for it.
                live = asked.window.live
                if asked.kind == "extend" or (live.key, asked.role) not in faults:
                    faults[live.key, asked.role] = Fault(live, asked.role, Refusal(code), detail)
        return list(faults.values())

    # -- candidates ----------------------------------------------------------------------------------------------

    def _join(self, rows: Sequence[Row]) -> None:
        """The candidates of these rows are known: ask every role for those that it lacks."""
        for block, indices in blocks([row.proposal() for row in rows]):
            members = [rows[index] for index in indices]
            for at, row in enumerate(members):
                row.block, row.at = block, at
            if members[0].window.guided and members[0].k != WHOLE:
                for role in GUIDED:
                    theirs = self._map(members[0].window.live, role)
                    at_rows, places, ids = block.missing(role, theirs.to_role)
                    self._look_up(Lookups(role, members, at_rows, places, block=block), ids, theirs)

    def _ask_early(self, rows: Sequence[Row]) -> None:
        """The guider has answered before the target: look its ids up in the target, which still computes."""
        shapes: dict[tuple[object, ...], list[Row]] = {}
        for row in rows:
            if row.window.guided and row.early is None and row.k == self._config.k and "guider" in row.slices:
                known = row.window.known["target"]
                shapes.setdefault((len(row.slices["guider"].ids), known.events.tobytes()), []).append(row)
        for members in shapes.values():
            ids = np.stack([row.slices["guider"].ids for row in members])
            theirs, to_guider = (self._map(members[0].window.live, role) for role in ("target", "guider"))
            asked = (ids >= 0) & (theirs.to_role[ids] >= 0)
            for event in members[0].window.known["target"].events.tolist():
                asked &= ids != event
            early = Early(asked, np.full(ids.shape, np.nan))
            for at, row in enumerate(members):
                row.early, row.early_at = early, at
            at_rows, slots = np.nonzero(asked)
            lookups = Lookups("target", members, at_rows, slots, early=early)
            self._look_up(lookups, theirs.to_role[ids[at_rows, slots]], to_guider)

    def _look_up(self, lookups: Lookups, ids: Ids, order: VocabularyMap) -> None:
        """Ask for ids, row after row; unless `order` keeps the order of ids, they are sorted first."""
        if not len(ids):
            return
        if not order.ascending:
            ids = lookups.sort(ids)
        for replica, part, its_ids in lookups.by_replica(ids):
            outbox = replica.outbox
            for row, count in part.counted():
                live = row.window.live
                ticket = self._ticketed(Asked("lookup", row.window, part.role, row=row, lookups=part))
                part.tickets.append(ticket)
                row.waiting += 1
                position, prefix = row.name(part.role)
                outbox.lookups.append((ticket, live.key, prefix, live.epoch, position, count))
            outbox.ids.append(its_ids)

    # -- tickets -------------------------------------------------------------------------------------------------

    def _done(self, asked: Asked) -> None:
        del self._asked[asked.ticket]
        asked.window.live.tickets[asked.role].discard(asked.ticket)
        if asked.kind == "lookup":
            assert asked.row is not None
            asked.row.waiting -= 1
            self._touched[asked.row] = None

    def _ticketed(self, asked: Asked) -> int:
        ticket = asked.ticket = next(self._ticket)
        self._asked[ticket] = asked
        asked.window.live.tickets.setdefault(asked.role, set()).add(ticket)
        return ticket

    def _forget(self, live: Live, role: Role, lookups_only: bool = False) -> None:
        tickets = live.tickets.get(role, set())
        for ticket in list(tickets):
            if not lookups_only or self._asked[ticket].kind == "lookup":
                del self._asked[ticket]
                tickets.discard(ticket)

    def _map(self, live: Live, role: Role) -> VocabularyMap:
        return self._languages.map(live.primary, role)
