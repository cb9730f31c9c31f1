"""Carries rows: extends the models, completes the candidates by lookups, widens rows, for many sessions at once.

What is asked of candidates is in `joining`. A row's candidates are the same in any order of arrival.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import numpy as np

from actors.api.generation import Role
from actors.config import Exchange as ExchangeConfig
from actors.coordinator.candidates import GUIDED, Joiner
from actors.coordinator.inflight import Asked, Fault, Tickets, read_rows
from actors.coordinator.replica_pool import Replica
from actors.coordinator.session import Live, Row, Trail, Window
from actors.decoding.candidates import Slice
from actors.decoding.cross_vocab.logprobs import Straddled
from actors.decoding.cross_vocab.translators import NOTHING_AHEAD, Ahead, Alignment
from actors.decoding.hashing import extend_hashes
from actors.decoding.vocabulary import Known, VocabularyMap
from actors.text.vocabularies import Languages
from actors.wire.columns import drafted_items
from actors.wire.messages import WHOLE, Drafted, Message, Refused, Rows, Values


class Exchange:
    """The rows in flight of one coordinator."""

    def __init__(self, config: ExchangeConfig, languages: Languages) -> None:
        self._config, self._languages = config, languages
        self._touched: dict[Row, None] = {}
        self._straddling: dict[Window, None] = {}  # of whose earlier rows nothing was asked yet
        self._tickets = Tickets(self._touch)
        self._joiner = Joiner(config.k, languages, self._tickets)

    # -- asking --------------------------------------------------------------------------------------------------

    def begin(self, live: Live, guided: bool, guesses: Sequence[int] = (), drafts: int = 0) -> None:
        """Start the session's next window; the replicas that it needs are bound.

        guesses: drafts that are known already, in the primary's ids. drafts: how many to ask of the guider instead.
        """
        known = self._known(live, guided)
        window = live.window = Window(live, guided, known, "guider" if drafts else None, drafts)
        if guided:
            needed = {role: reader.oldest_row() for role, reader in live.session.readers.items()}
            window.oldest = {role: oldest for role, oldest in needed.items() if oldest is not None}
        if (
            drafts and window.aligned and not self._ready_to_draft(window)
        ):  # its rows are asked for without drafts first
            window.drafter, drafts = None, 0
        if drafts:
            self._ask_drafts(window)
        else:
            self._check(window, guesses)

    def read_prompt(self, live: Live, guided: bool, reads: Mapping[Role, Sequence[int]]) -> None:
        """Ask for whole rows inside the prompt. reads: how many of its tokens each role has read at each row."""
        window = live.window = Window(live, guided, self._known(live, guided), reads_prompt=True)
        for role in window.roles:
            stream, ends = live.session.streams[role], reads[role]
            first = window.first[role] = ends[0] - 1
            window.reads[role] = [end - ends[0] for end in ends]
            window.tails[role] = stream.tokens[ends[0] : ends[-1]]
            window.hashes[role] = [stream.hash_before(end) for end in range(first + 1, ends[-1] + 1)]
        window.rows = [Row(window, index, WHOLE) for index in range(len(reads[live.primary]))]
        for role in window.roles:
            self._extend(window, role)

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
        live.trails.pop(role, None)
        self._tickets.forget(live, role)
        window.answered.discard(role)
        for row in window.rows[window.next :]:
            row.slices.pop(role, None)
            row.restart()
            self._touched[row] = None
        for other in window.roles:
            self._tickets.forget(live, other, lookups_only=True)
        self._extend(window, role)
        if window.aligned:
            self._straddling[window] = None

    def ask_straddlers(self) -> None:
        """Ask what the windows begun since the last call need of earlier rows, before all that was asked is sent."""
        asked, self._straddling = self._straddling, {}
        self._joiner.ask_straddlers(window for window in asked if window.live.window is window)

    def read(self, live: Live, role: Role) -> None:
        """Let a role read what it will need later. Nobody waits for it: if it fails, the tokens are sent again."""
        stream = live.session.streams[role]
        if tokens := stream.tokens[stream.held :]:
            prefix, outbox, ticket = stream.hash_before(stream.held), live.replicas[role].outbox, self._tickets.number()
            item = (ticket, live.key, live.age, prefix, live.epoch, stream.held, len(tokens), 0, 0, 0, 0)
            live.trails.pop(role, None)
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
            self._tickets.forget(live, role)
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
        ticket = self._tickets.issue(Asked("widen", row.window, role, row=row, before=before))
        live.replicas[role].outbox.widens.append((ticket, live.key, prefix, live.epoch, position, row.k))

    def _ask_drafts(self, window: Window) -> None:
        """Let the guider append the session's newest tokens and go on by itself."""
        live = window.live
        request, outbox = live.session.request, live.replicas["guider"].outbox
        window.hashes["guider"] = [self._begin_role(window, "guider")]
        sampling = request.sampling
        at, noise = len(outbox.extends), len(live.session.primary)
        # Its noise is that of its own ids: where these are not the target's, the likeliest token is the best guess.
        temperature = 0.0 if self._languages.aligned else sampling.temperature
        outbox.drafting.append((at, window.wanted, request.seed, noise, temperature, sampling.top_p))
        self._extend(window, "guider", drafting=True)

    def _check(self, window: Window, guesses: Sequence[int], drafted: Sequence[int] = ()) -> None:
        """The drafts are known: ask for the rows behind them."""
        k = WHOLE if self._config.mode == "full" else self._config.k
        ahead = self._ahead(window, guesses, drafted)
        window.rows = [Row(window, index, k) for index in range(len(ahead[window.live.primary].ends))]
        for role, part in ahead.items():
            begun = self._begin_role(window, role)
            window.tails[role], window.reads[role] = list(part.tokens), part.ends
            window.hashes[role] = [begun, *extend_hashes(begun, part.tokens)]
            if role in window.oldest:
                for row, straddle in zip(window.rows, part.straddles, strict=True):
                    if straddle is not None:
                        row.straddled[role] = Straddled(straddle)
        for role in window.roles:
            if role != window.drafter:
                self._extend(window, role)
        if window.aligned:
            self._straddling[window] = None

    def _ahead(self, window: Window, guesses: Sequence[int], drafted: Sequence[int]) -> dict[Role, Ahead]:
        """What each role reads of the guesses, as many of them as all read one after another."""
        live, session = window.live, window.live.session
        readers = {r: reader for r, reader in session.readers.items() if r in window.roles or r == window.drafter}
        small = {role: reader.ahead(guesses) for role, reader in readers.items()}
        rows = len(guesses) + 1
        for role, part in small.items() if guesses else ():
            room = live.room(role)
            fitting = [read <= room for read in part.ends]
            if role == window.drafter:
                fitting = [
                    fits and part.tokens[:read] == tuple(drafted[:read])
                    for fits, read in zip(fitting, part.ends, strict=True)
                ]
            rows = min(rows, max(1, fitting.index(False) if False in fitting else len(fitting)))
        own = Ahead(tuple(guesses[: rows - 1]), tuple(range(rows)), (None,) * rows) if guesses else NOTHING_AHEAD
        return {live.primary: own} | {role: part.first(rows) for role, part in small.items()}

    def _begin_role(self, window: Window, role: Role) -> int:
        """Note where a role's rows begin; the running hash up to the first row's token."""
        stream = window.live.session.streams[role]
        window.first[role] = len(stream) - 1
        return stream.hash_before(len(stream))

    def _ready_to_draft(self, window: Window) -> bool:
        """Whether the guider holds all rows that a row may need, but for the newest: a draft gives one row only."""
        live, last = window.live, len(window.live.session.streams["guider"]) - 1
        window.first["guider"] = last
        trail = live.trails.get("guider")
        reach = window.oldest["guider"]
        if trail is not None:
            reach = trail.reach(reach, last, partial(window.name, "guider"))
        return reach == last and live.session.streams["guider"].held >= last

    def _extend(self, window: Window, role: Role, drafting: bool = False) -> None:
        """Send a role the session's newest tokens and the drafts behind them; ask for the window's rows."""
        live, needed, first = window.live, window.known.get(role), window.first[role]
        stream, tail = live.session.streams[role], window.tails.get(role, [])
        end, fresh, keep = first + 1 + len(tail), first, 0
        if role in window.oldest:
            trail, name_of = live.trails.setdefault(role, Trail()), partial(window.name, role)
            reach = trail.reach(window.oldest[role], end, name_of)
            fresh = min(reach, max(stream.held, window.oldest[role]), first if drafting else end)
            keep = trail.kept(fresh, name_of) if fresh <= stream.held else 0
            if fresh == end:  # nothing new to read: the replica has said all
                window.answered.add(role)
            self._recall(window, role, trail, fresh)
            if fresh == end:
                return
        else:
            live.trails.pop(role, None)  # none of these rows stay
        position = min(stream.held, fresh)
        tokens = [*stream.tokens[position : first + 1], *tail]
        k = self._width(window, role)
        ids = needed.ids if needed is not None else np.zeros(0, np.int32)
        rows = end - fresh
        ticket = self._tickets.issue(Asked("extend", window, role, known=needed, start=fresh))
        prefix = stream.hash_before(position)
        outbox = live.replicas[role].outbox
        item = (ticket, live.key, live.age, prefix, live.epoch, position, len(tokens), rows, k, len(ids), keep)
        outbox.extends.append(item)
        outbox.tokens += tokens
        outbox.know.append(ids)

    def _recall(self, window: Window, role: Role, trail: Trail, fresh: int) -> None:
        """Rows before `fresh` are known already."""
        for row in window.rows[window.next :]:
            if row.position(role) < fresh:
                part = trail.get(row.name(role))
                assert part is not None
                self._hear(row, role, part)

    def _width(self, window: Window, role: Role) -> int:
        """Of the slices that a role is asked for."""
        if role not in window.known:
            return 0  # it only drafts
        if self._config.mode == "full" or window.reads_prompt:
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
                self._tickets.valued(message)
            elif isinstance(message, Drafted):
                self._take_drafts(message)
            elif isinstance(message, Refused):
                faults += self._tickets.refused(message)
        return faults

    def advance(self) -> list[Window]:
        """Ask for what the rows touched since the last call still lack; windows whose next row is complete."""
        touched, self._touched = list(self._touched), {}
        self._joiner.advance(row for row in touched if not row.window.reads_prompt)
        return [window for window in dict.fromkeys(row.window for row in touched) if window.ready()]

    def _take_rows(self, message: Rows, replica: Replica) -> None:
        replica.pace.observe(message.packed, message.micros / 1e6)
        asked = [self._tickets.get(ticket) for ticket in message.items["ticket"].tolist()]
        for one, slices in read_rows(message, asked, replica.welcome.width, self._map):
            if one is None:
                continue
            self._tickets.done(one)
            window, role = one.window, one.role
            if one.kind == "widen":
                assert one.row is not None
                self._arrive(one.row, role, slices[0])
                continue
            window.answered.add(role)
            if role == window.drafter and not window.rows:
                self._check(window, [])  # it drafted nothing
            if role in window.oldest:
                trail = window.live.trails.setdefault(role, Trail())
                used = window.first[role] + len(window.hashes[role])  # more may have been drafted
                for position, part in zip(range(one.start, used), slices):  # noqa: B905
                    trail.note(window.name(role, position), part)
            if role in window.known:
                for row in window.rows[window.next :]:
                    at = row.position(role) - one.start
                    if 0 <= at < len(slices):  # drafts may have been cut
                        self._hear(row, role, slices[at])

    def _hear(self, row: Row, role: Role, part: Slice) -> None:
        """A role said of a row what an extend says."""
        if self._too_narrow(row, role):
            self._widen(row, role, part)  # it had been widened when the role began anew
        else:
            self._arrive(row, role, part)

    def _arrive(self, row: Row, role: Role, part: Slice) -> None:
        if (straddled := row.straddled.get(role)) is not None:
            trail, window = row.window.live.trails[role], row.window
            for number in range(straddled.rows):
                earlier = trail.get(window.name(role, straddled.straddle.first - 1 + number))
                assert earlier is not None
                straddled.sums[number] = earlier.logsumexp
        row.slices[role] = part
        if row.block is not None:
            row.block.arrive(role, row.at, part)
        self._touch(row)

    def _touch(self, row: Row) -> None:
        self._touched[row] = None

    def _take_drafts(self, message: Drafted) -> None:
        for ticket, tokens in drafted_items(message):
            asked = self._tickets.get(ticket)
            if asked is not None and not asked.window.rows:
                window = asked.window
                self._check(window, window.live.session.readers["guider"].guesses(tokens), tokens)

    def _map(self, live: Live, role: Role) -> VocabularyMap | Alignment:
        return self._languages.map(live.primary, role)
