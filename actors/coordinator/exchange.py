"""Sends extend, lookup and widen requests to replicas and collects their logits, for many sessions at once.

Candidates are joined in `actors.coordinator.candidates`. A row's candidates do not depend on the order of arrival.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from actors.api.generation import Role
from actors.config import Exchange as ExchangeConfig
from actors.coordinator.candidates import GUIDED, CandidateCompleter
from actors.coordinator.inflight import Fault, InflightCall, InflightCalls, read_rows
from actors.coordinator.replica_pool import Replica
from actors.coordinator.session import ActiveSession, LogitsRow, RowHistory, VerificationWindow
from actors.decoding.candidates import RowSlice
from actors.decoding.cross_vocab.logprobs import CrossingRows
from actors.decoding.cross_vocab.translators import NO_DRAFTS, Alignment, DraftTranslation
from actors.decoding.hashing import extend_hashes
from actors.decoding.vocabulary import RequiredLogits, VocabularyMap
from actors.text.vocabularies import VocabularyRegistry
from actors.wire.columns import NO_IDS, Draft, ExtendItem, RowRequest, drafted_items
from actors.wire.messages import WHOLE, Drafted, Message, Refused, Rows, Values


class Exchange:
    """Requests the logits rows of one coordinator's sessions, and collects the replies."""

    def __init__(self, config: ExchangeConfig, vocabularies: VocabularyRegistry) -> None:
        self._config, self._vocabularies = config, vocabularies
        self._touched: dict[LogitsRow, None] = {}
        self._crossing_pending: dict[
            VerificationWindow, None
        ] = {}  # windows whose lookups of earlier rows are not sent yet
        self._calls = InflightCalls(self._touch)
        self._completer = CandidateCompleter(config.k, vocabularies, self._calls)

    # -- requests --------------------------------------------------------------------------------------------------

    def begin(
        self, active: ActiveSession, guided: bool, text_drafts: Sequence[int] = (), guider_drafts: int = 0
    ) -> None:
        """Begin the session's next window. The session is bound to a replica of every role that takes part.

        text_drafts: drafts from the session's own text, in the primary's ids. guider_drafts: number to request from
        the guider instead.
        """
        required = self._required(active, guided)
        window = active.window = VerificationWindow(
            active, guided, required, "guider" if guider_drafts else None, guider_drafts
        )
        if guided:
            needed = {role: translator.oldest_needed_row() for role, translator in active.session.translators.items()}
            window.oldest = {role: oldest for role, oldest in needed.items() if oldest is not None}
        if (
            guider_drafts and window.aligned and not self._ready_to_draft(window)
        ):  # request the missing rows without drafts first
            window.drafting_role, guider_drafts = None, 0
        if guider_drafts:
            self._request_drafts(window)
        else:
            self._request_rows(window, text_drafts)

    def read_prompt(self, active: ActiveSession, guided: bool, reads: Mapping[Role, Sequence[int]]) -> None:
        """Request whole rows inside the prompt. reads: number of its tokens that each role has read at each row."""
        window = active.window = VerificationWindow(active, guided, self._required(active, guided), scores_prompt=True)
        for role in window.roles:
            stream, ends = active.session.streams[role], reads[role]
            first = window.first[role] = ends[0] - 1
            window.reads[role] = [end - ends[0] for end in ends]
            window.draft_tokens[role] = stream.tokens[ends[0] : ends[-1]]
            window.hashes[role] = [stream.hash_before(end) for end in range(first + 1, ends[-1] + 1)]
        window.rows = [LogitsRow(window, index, WHOLE) for index in range(len(reads[active.primary]))]
        for role in window.roles:
            self._extend(window, role)

    def _required(self, active: ActiveSession, guided: bool) -> Mapping[Role, RequiredLogits]:
        """Required ids of the rows in the session's next window, by role."""
        lifted = active.session.required_ids()
        if not lifted and guided in active.required:
            return active.required[guided]
        forced = tuple(sorted(lifted & self._vocabularies.legal(active.primary)))
        end, roles = active.session.request.thinking.end, GUIDED if guided else (active.primary,)
        required = {role: self._vocabularies.required(active.primary, role, end, forced) for role in roles}
        if not lifted:
            active.required[guided] = required
        return required

    def extend_again(self, active: ActiveSession, role: Role, held: int) -> None:
        """Request a role's rows of the window again. held: tokens that its replica holds."""
        window = active.window
        assert window is not None
        stream = active.session.streams[role]
        stream.lose(min(held, len(stream) - 1))
        active.row_histories.pop(role, None)
        self._calls.forget(active, role)
        window.answered.discard(role)
        for row in window.rows[window.next :]:
            row.extend_again(role)
            self._touched[row] = None
        for other in window.roles:
            self._calls.forget(active, other, lookups_only=True)
        self._extend(window, role)
        if window.aligned:
            self._crossing_pending[window] = None

    def look_up_crossing_rows(self) -> None:
        """Look up tokens in earlier rows for windows begun since the last call. Call before the outboxes are sent."""
        pending, self._crossing_pending = self._crossing_pending, {}
        self._completer.look_up_crossing_rows(window for window in pending if window.active.window is window)

    def extend_ahead(self, active: ActiveSession, role: Role) -> None:
        """Extend a role by tokens whose rows are not needed. No reply is awaited: lost tokens are sent again later."""
        stream = active.session.streams[role]
        if tokens := stream.tokens[stream.held :]:
            prefix, call_id = stream.hash_before(stream.held), self._calls.unawaited_id()
            item = ExtendItem(
                call_id,
                active.key,
                active.age,
                prefix,
                active.epoch,
                stream.held,
                tokens,
                rows=0,
                k=0,
                required_ids=NO_IDS,
            )
            active.row_histories.pop(role, None)
            active.replicas[role].outbox.extends.append(item)
            stream.hold(len(stream))

    def widen(self, row: LogitsRow, k: int) -> None:
        """Request wider slices of a row (WHOLE: the whole row of every role)."""
        row.widen(k)
        for role in row.window.roles:
            if self._too_narrow(row, role):
                self._widen(row, role, row.slices.pop(role))

    def drop(self, active: ActiveSession) -> None:
        """Forget the session's window and its calls in flight."""
        for role in list(active.call_ids):
            self._calls.forget(active, role)
        if active.window is not None:
            for row in active.window.dissolve():
                self._touched.pop(row, None)
            active.window = None

    def _too_narrow(self, row: LogitsRow, role: Role) -> bool:
        """True if the row is decided by more than the slice that a role's extend returns."""
        if row.k == self._width(row.window, row.window.active.primary):
            return False
        return row.k == WHOLE or not (role == "guider_base" and row.window.guided)

    def _widen(self, row: LogitsRow, role: Role, before: RowSlice) -> None:
        active = row.window.active
        position, prefix = row.key(role)
        call_id = self._calls.issue(InflightCall("widen", row.window, role, row=row, before=before))
        item = RowRequest(call_id, active.key, prefix, active.epoch, position, row.k)
        active.replicas[role].outbox.widens.append(item)

    def _request_drafts(self, window: VerificationWindow) -> None:
        """Let the guider append the session's newest tokens, and draft behind them."""
        active = window.active
        request = active.session.request
        window.hashes["guider"] = [self._begin_role(window, "guider")]
        sampling = request.sampling
        noise = len(active.session.primary)
        # Noise is drawn by token id: where the guider's ids are not the target's, its likeliest token drafts best.
        temperature = 0.0 if self._vocabularies.aligned else sampling.temperature
        self._extend(window, "guider", Draft(window.wanted, request.seed, noise, temperature, sampling.top_p))

    def _request_rows(self, window: VerificationWindow, drafts: Sequence[int], drafted: Sequence[int] = ()) -> None:
        """Request the rows behind the drafts."""
        k = WHOLE if self._config.mode == "full" else self._config.k
        ahead = self._translate_drafts(window, drafts, drafted)
        window.rows = [LogitsRow(window, index, k) for index in range(len(ahead[window.active.primary].ends))]
        for role, part in ahead.items():
            begun = self._begin_role(window, role)
            window.draft_tokens[role], window.reads[role] = list(part.tokens), part.ends
            window.hashes[role] = [begun, *extend_hashes(begun, part.tokens)]
            if role in window.oldest:
                for row, boundaries in zip(window.rows, part.boundaries_by_row, strict=True):
                    if boundaries is not None:
                        row.crossing[role] = CrossingRows(boundaries)
        for role in window.roles:
            if role != window.drafting_role:
                self._extend(window, role)
        if window.aligned:
            self._crossing_pending[window] = None

    def _translate_drafts(
        self, window: VerificationWindow, drafts: Sequence[int], drafted: Sequence[int]
    ) -> dict[Role, DraftTranslation]:
        """Translate the drafts for each role, cut to as many as every role can append."""
        active, session = window.active, window.active.session
        translators = {
            r: translator
            for r, translator in session.translators.items()
            if r in window.roles or r == window.drafting_role
        }
        small = {role: translator.translate_drafts(drafts) for role, translator in translators.items()}
        rows = len(drafts) + 1
        for role, part in small.items() if drafts else ():
            room = active.room(role)
            fitting = [read <= room for read in part.ends]
            if role == window.drafting_role:
                fitting = [
                    fits and part.tokens[:read] == tuple(drafted[:read])
                    for fits, read in zip(fitting, part.ends, strict=True)
                ]
            rows = min(rows, max(1, fitting.index(False) if False in fitting else len(fitting)))
        own = DraftTranslation(tuple(drafts[: rows - 1]), tuple(range(rows)), (None,) * rows) if drafts else NO_DRAFTS
        return {active.primary: own} | {role: part.truncated(rows) for role, part in small.items()}

    def _begin_role(self, window: VerificationWindow, role: Role) -> int:
        """Note where a role's rows begin. Returns the running hash up to the first row's token."""
        stream = window.active.session.streams[role]
        window.first[role] = len(stream) - 1
        return stream.hash_before(len(stream))

    def _ready_to_draft(self, window: VerificationWindow) -> bool:
        """True if the guider holds every earlier row that may be needed: a drafting extend returns none of them."""
        active, last = window.active, len(window.active.session.streams["guider"]) - 1
        window.first["guider"] = last
        history = active.row_histories.get("guider")
        reach = window.oldest["guider"]
        if history is not None:
            reach = history.reach(reach, last, partial(window.key, "guider"))
        return reach == last and active.session.streams["guider"].held >= last

    def _extend(self, window: VerificationWindow, role: Role, draft: Draft | None = None) -> None:
        """Send a role the session's newest tokens and the drafts behind them, and request the window's rows.

        Example: the stream has 21 tokens, of which the replica holds 19, and the drafts are [7, 8]. Tokens 19 and 20,
        then 7 and 8, are sent from position 19 on; the rows of the last three tokens (positions 20, 21, 22) are
        requested. A role with another vocabulary also needs earlier rows, from window.oldest on: rows that its history
        holds are taken from there, and `fresh` is the first position whose row is requested.
        """
        active, needed, first = window.active, window.required.get(role), window.first[role]
        stream, tail = active.session.streams[role], window.draft_tokens.get(role, [])
        end, fresh, keep = first + 1 + len(tail), first, 0
        if role in window.oldest:
            history, key_of = active.row_histories.setdefault(role, RowHistory()), partial(window.key, role)
            reach = history.reach(window.oldest[role], end, key_of)
            fresh = min(reach, max(stream.held, window.oldest[role]), first if draft is not None else end)
            keep = history.kept(fresh, key_of) if fresh <= stream.held else 0
            if fresh == end:  # no new token, and every row is held
                window.answered.add(role)
            self._take_held_rows(window, role, history, fresh)
            if fresh == end:
                return
        else:
            active.row_histories.pop(role, None)  # the replica keeps none of these rows
        position = min(stream.held, fresh)
        tokens = [*stream.tokens[position : first + 1], *tail]
        k = self._width(window, role)
        ids = needed.ids if needed is not None else NO_IDS
        rows = end - fresh
        heat = self._temperature(window, role)
        call = InflightCall("extend", window, role, required=needed, start=fresh, temperature=heat)
        call_id = self._calls.issue(call)
        prefix = stream.hash_before(position)
        requested = rows, k, ids, draft, keep, heat
        item = ExtendItem(call_id, active.key, active.age, prefix, active.epoch, position, tokens, *requested)
        active.replicas[role].outbox.extends.append(item)

    def _take_held_rows(self, window: VerificationWindow, role: Role, history: RowHistory, fresh: int) -> None:
        """Take the rows before `fresh` from the history."""
        for row in window.rows[window.next :]:
            if row.position(role) < fresh:
                part = history.get(row.key(role))
                assert part is not None
                self._take_slice(row, role, part)

    @staticmethod
    def _temperature(window: VerificationWindow, role: Role) -> float:
        """Temperature of a role's tempered logsumexp, from which the primary's rows are filtered."""
        active = window.active
        sampled = role == active.primary and not window.scores_prompt
        return (active.session.request.sampling.temperature or 1.0) if sampled else 1.0

    def _width(self, window: VerificationWindow, role: Role) -> int:
        """Width of the slices that a role's extend returns."""
        if role not in window.required:
            return 0  # it only drafts
        if self._config.mode == "full" or window.scores_prompt:
            return WHOLE
        return 0 if role == "guider_base" and window.guided else self._config.k

    # -- replies -------------------------------------------------------------------------------------------------

    def receive(self, messages: Iterable[tuple[Replica, Message]]) -> list[Fault]:
        """Store replies. Returns the refusals. Replies to forgotten calls are ignored."""
        faults: list[Fault] = []
        for replica, message in messages:
            if isinstance(message, Rows):
                self._take_rows(message, replica)
            elif isinstance(message, Values):
                self._calls.take_values(message)
            elif isinstance(message, Drafted):
                self._take_drafts(message)
            elif isinstance(message, Refused):
                faults += self._calls.take_refusals(message)
        return faults

    def advance(self) -> list[VerificationWindow]:
        """Request what touched rows still lack. Returns the windows among theirs whose next row is complete."""
        touched, self._touched = list(self._touched), {}
        self._completer.advance(row for row in touched if not row.window.scores_prompt)
        for row in touched:
            row.complete_if_answered()
        return [window for window in dict.fromkeys(row.window for row in touched) if window.ready()]

    def _take_rows(self, message: Rows, replica: Replica) -> None:
        replica.forward_time.observe(message.packed, message.micros / 1e6)
        calls = [self._calls.get(call_id) for call_id in message.items["call_id"].tolist()]
        for call, slices in read_rows(message, calls, replica.welcome.width, self._map):
            if call is None:
                continue
            self._calls.complete(call)
            window, role = call.window, call.role
            if call.kind == "widen":
                assert call.row is not None
                self._add_slice(call.row, role, slices[0])
                continue
            window.answered.add(role)
            if role == window.drafting_role and not window.rows:
                self._request_rows(window, [])  # no draft came
            if role in window.oldest:
                history = window.active.row_histories.setdefault(role, RowHistory())
                used = window.first[role] + len(window.hashes[role])  # more may have been drafted
                for position, part in zip(range(call.start, used), slices):  # noqa: B905
                    history.add(window.key(role, position), part)
            if role in window.required:
                for row in window.rows[window.next :]:
                    at = row.position(role) - call.start
                    if 0 <= at < len(slices):  # drafts may have been cut
                        self._take_slice(row, role, slices[at])

    def _take_slice(self, row: LogitsRow, role: Role, part: RowSlice) -> None:
        """Store the slice of an extend, or request a wider one if the row has been widened."""
        if self._too_narrow(row, role):
            row.enter_widening()  # the row was widened before the role was extended again
            self._widen(row, role, part)
        else:
            self._add_slice(row, role, part)

    def _add_slice(self, row: LogitsRow, role: Role, part: RowSlice) -> None:
        if (crossing := row.crossing.get(role)) is not None:
            history, window = row.window.active.row_histories[role], row.window
            for number in range(crossing.rows):
                earlier = history.get(window.key(role, crossing.boundaries.first - 1 + number))
                assert earlier is not None
                crossing.sums[number] = earlier.logsumexp
        row.slices[role] = part
        if row.block is not None:
            row.block.add_slice(role, row.at, part)
        self._touch(row)

    def _touch(self, row: LogitsRow) -> None:
        self._touched[row] = None

    def _take_drafts(self, message: Drafted) -> None:
        for call_id, tokens in drafted_items(message):
            call = self._calls.get(call_id)
            if call is not None and not call.window.rows:
                window = call.window
                self._request_rows(window, window.active.session.translators["guider"].drafts_in_target(tokens), tokens)

    def _map(self, active: ActiveSession, role: Role) -> VocabularyMap | Alignment:
        return self._vocabularies.map(active.primary, role)
