"""Sends extend, lookup and widen requests to replicas and collects their logits, for many sessions at once.

Candidates are joined in `actors.coordinator.candidates`. A row's candidates do not depend on the order of arrival. What
a turn begins is requested together, by `request`: rows of one shape share a frame, and calls to one role a batch.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actors.api.generation import Role
from actors.config import Exchange as ExchangeConfig
from actors.coordinator.candidates import GUIDED, CandidateCompleter, Frame
from actors.coordinator.frames import FrameShape, RowFrame, row_numbers
from actors.coordinator.inflight import CallBatch, InflightCalls
from actors.coordinator.replica_pool import Replica
from actors.coordinator.session import ActiveSession, LogitsRow, RowHistory, VerificationWindow
from actors.coordinator.states import RowStage
from actors.decoding.candidates import Ids, RowSlice
from actors.decoding.cross_vocab.logprobs import CrossingRows
from actors.decoding.cross_vocab.translators import NO_DRAFTS, DraftTranslation
from actors.decoding.hashing import extend_hashes
from actors.decoding.kernels import ALL, ONLY_REQUIRED, ONLY_SLICES, SentRows, locate_rows
from actors.decoding.vocabulary import RequiredLogits
from actors.text.vocabularies import VocabularyRegistry
from actors.wire.columns import NO_IDS, Draft, ExtendColumns, RowRequest, drafted_items, rows_ids
from actors.wire.ids import page_counts
from actors.wire.messages import (
    EXTEND_ITEM,
    WHOLE,
    Drafted,
    Message,
    ProtocolError,
    Refusal,
    Refused,
    Rows,
    Values,
)

Batch = CallBatch[VerificationWindow]


@dataclass(frozen=True, slots=True)
class Fault:
    """A refusal of a session's item by a replica."""

    active: ActiveSession
    role: Role
    code: Refusal
    detail: int

    def pause(self) -> float:
        """Seconds to wait before the item is sent again, with jitter. The first cache misses are repaired at once."""
        misses = self.active.misses
        pauses: dict[Refusal, float] = {
            Refusal.FULL: self.detail / 1000,
            Refusal.FAILED: min(2.0, 0.05 * 2.0**self.active.faults),
            Refusal.KV_MISS: min(1.0, 0.01 * 2.0 ** min(misses, 10)) if misses > 2 else 0.0,
        }
        return pauses.get(self.code, 0.0) * random.uniform(0.5, 1.0)


class PendingExtend(NamedTuple):
    """An extend that the next `request` sends: `tokens` from `position` of the role's stream on.

    start: position of the first row whose logits are requested. temperature: of their tempered logsumexp.
    """

    window: VerificationWindow
    position: int
    tokens: list[int]
    rows: int
    k: int
    required_ids: NDArray[np.int32]
    draft: Draft | None
    keep: int
    start: int
    temperature: float


class Exchange:
    """Requests the logits rows of one coordinator's sessions, and collects the replies."""

    def __init__(self, config: ExchangeConfig, vocabularies: VocabularyRegistry) -> None:
        self._config, self._vocabularies = config, vocabularies
        self._touched: dict[Frame, None] = {}
        self._unplaced: list[VerificationWindow] = []  # windows whose rows have no frame yet
        self._widened: list[LogitsRow] = []  # rows whose wider slices are not requested yet
        self._extends: dict[Role, list[PendingExtend]] = {}
        # windows whose lookups of earlier rows are not sent yet
        self._crossing_pending: dict[VerificationWindow, None] = {}
        self._calls: InflightCalls[VerificationWindow] = InflightCalls()
        self._completer = CandidateCompleter(config.k, vocabularies, self._calls)

    # -- requests --------------------------------------------------------------------------------------------------

    def request(self) -> None:
        """Put what was begun since the last call into the outboxes of the replicas. Call before these are sent."""
        self._place()
        self._place_widened()
        crossing, self._crossing_pending = self._crossing_pending, {}
        self._completer.look_up_crossing_rows(window for window in crossing if window.active.window is window)
        extends, self._extends = self._extends, {}
        for role, pending in extends.items():
            by_replica: dict[Replica, list[PendingExtend]] = {}
            for each in pending:
                if each.window.active.window is each.window:  # else it has ended
                    by_replica.setdefault(each.window.active.replicas[role], []).append(each)
            for replica, members in by_replica.items():
                first = self._calls.issue(CallBatch("extend", role, [each.window for each in members], members))
                replica.outbox.extends.append(_extend_columns(first, role, members))

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
        self._unplaced.append(window)
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
        self._place()
        window = active.window
        assert window is not None
        stream = active.session.streams[role]
        stream.lose(min(held, len(stream) - 1))
        active.row_histories.pop(role, None)
        self._calls.forget(window, role)
        window.answered.discard(role)
        for row in window.rows[window.next :]:
            row.lose(role)
            self._touched[row.frame] = None
        for other in window.roles:
            self._calls.forget(window, other, lookups_only=True)
        self._extend(window, role)
        if window.aligned:
            self._crossing_pending[window] = None

    def extend_ahead(self, active: ActiveSession, role: Role) -> None:
        """Extend a role by tokens whose rows are not needed. No reply is awaited: lost tokens are sent again later."""
        stream = active.session.streams[role]
        if tokens := stream.tokens[stream.held :]:
            prefix, call_id = stream.hash_before(stream.held), self._calls.unawaited_id()
            row = call_id, active.key, active.age, prefix, active.epoch, stream.held, len(tokens), 0, 0, 0, 0, 1.0
            columns = ExtendColumns(np.array([row], EXTEND_ITEM), tokens, [], {})
            active.row_histories.pop(role, None)
            active.replicas[role].outbox.extends.append(columns)
            stream.hold(len(stream))

    def widen(self, row: LogitsRow, k: int) -> None:
        """Request wider slices of a row (WHOLE: the whole row of every role)."""
        row.widen(k)
        self._widened.append(row)

    def drop(self, active: ActiveSession) -> None:
        """Forget the session's window and its calls in flight."""
        window = active.window
        if window is not None:
            self._calls.forget(window)
            window.dissolve()
            active.window = None

    def _place(self) -> None:
        """Put the rows of windows that were begun into frames, those of one shape into one."""
        unplaced, self._unplaced = self._unplaced, []
        shapes: dict[tuple[object, ...], tuple[FrameShape, list[LogitsRow]]] = {}
        for window in unplaced:
            if window.rows:
                shape = window.shape(window.rows[0].k)
                shapes.setdefault(shape.key, (shape, []))[1].extend(window.rows)
        for shape, rows in shapes.values():
            self._frame(rows, shape, RowStage.EXTENDING)

    def _frame(self, rows: Sequence[LogitsRow], shape: FrameShape, stage: RowStage) -> Frame:
        """Put rows into a frame."""
        widths = {role: self._slice_width(shape, role) for role in shape.required}
        proposing: Sequence[Role] = tuple(shape.required)
        if shape.scores_prompt:
            proposing = ()
        elif shape.guided and shape.k != WHOLE:
            proposing = GUIDED[:2]
        elif shape.aligned:
            proposing = GUIDED[:1]
        frame = RowFrame(rows, shape, widths, proposing, stage)
        for at, row in enumerate(rows):
            row.place(frame, at)
        return frame

    def _slice_width(self, shape: FrameShape, role: Role) -> int:
        """The most ids that a role proposes for a row, in ids of the primary."""
        if shape.aligned and role != shape.primary:  # tokens of the guider's slice, and of boundary-crossing tokens
            return shape.k + self._config.k if role == "guider" and shape.k != WHOLE else 0
        if shape.k == WHOLE:
            return self._vocabularies.width(role)
        return 0 if role == "guider_base" and shape.guided else min(shape.k, self._vocabularies.width(role))

    def _place_widened(self) -> None:
        """Move widened rows into frames of their new width, and request the wider slices."""
        widened, self._widened = self._widened, []
        shapes: dict[tuple[object, ...], tuple[FrameShape, RowStage, list[LogitsRow]]] = {}
        for row in widened:
            if row in row.window.rows:  # else the window has ended
                shape, stage = row.window.shape(row.k), RowStage(row.frame.stage[row.at])
                shapes.setdefault((stage, *shape.key), (shape, stage, []))[2].append(row)
        for shape, stage, rows in shapes.values():
            narrow = [(row.frame, row.at) for row in rows]
            frame = self._frame(rows, shape, stage)
            for row, (before, at) in zip(rows, narrow, strict=True):
                frame.block.copy_required(row.at, before.block, at)
                before.abandon(at)
            for role in shape.required:
                if self._too_narrow(rows[0], role):
                    for row in rows:
                        row.slices.pop(role, None)
                    self._request_wider(rows, role)
                else:
                    frame.receive(role, np.arange(len(rows)))

    def _too_narrow(self, row: LogitsRow, role: Role) -> bool:
        """True if the row is decided by more than the slice that a role's extend returns."""
        if row.k == self._width(row.window, row.window.active.primary):
            return False
        return row.k == WHOLE or not (role == "guider_base" and row.window.guided)

    def _request_wider(self, rows: Sequence[LogitsRow], role: Role) -> None:
        first = self._calls.issue(CallBatch("widen", role, [row.window for row in rows], list(rows)))
        for call_id, row in enumerate(rows, first):
            active, (position, prefix) = row.window.active, row.key(role)
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
        ahead = dict.fromkeys(window.roles, NO_DRAFTS)
        if drafts or window.oldest or window.drafting_role is not None:
            ahead = self._translate_drafts(window, drafts, drafted)
        window.rows = [LogitsRow(window, index, k) for index in range(len(ahead[window.active.primary].ends))]
        for role, part in ahead.items():
            begun = self._begin_role(window, role)
            window.draft_tokens[role], window.reads[role] = list(part.tokens), part.ends
            window.hashes[role] = [begun, *extend_hashes(begun, part.tokens)] if part.tokens else [begun]
            if role in window.oldest:
                for row, boundaries in zip(window.rows, part.boundaries_by_row, strict=True):
                    if boundaries is not None:
                        row.crossing[role] = CrossingRows(boundaries)
        self._unplaced.append(window)
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
        requested = position, tokens, rows, k, ids, draft, keep, fresh, heat
        self._extends.setdefault(role, []).append(PendingExtend(window, *requested))

    def _take_held_rows(self, window: VerificationWindow, role: Role, history: RowHistory, fresh: int) -> None:
        """Take the rows before `fresh` from the history."""
        held = [row for row in window.rows[window.next :] if row.position(role) < fresh]
        if held:
            self._place()
        for row in held:
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
                self._take_values(message)
            elif isinstance(message, Drafted):
                self._take_drafts(message)
            elif isinstance(message, Refused):
                faults += self._take_refusals(message)
        return faults

    def advance(self) -> list[VerificationWindow]:
        """Request what touched rows still lack. Returns the windows among theirs whose next row is complete."""
        touched, self._touched = list(self._touched), {}
        windows: dict[VerificationWindow, None] = {}
        for frame in touched:
            for row in frame.owners_of(self._completer.advance(frame)):
                windows[row.window] = None
        return [window for window in windows if window.ready()]

    def _take_rows(self, message: Rows, replica: Replica) -> None:
        """Store the rows of extends and widenings, those of one frame together."""
        replica.forward_time.observe(message.packed, message.micros / 1e6)
        columns = _RowColumns(message, replica.welcome.width)
        for begin, end, batch, number in self._calls.find(message.items["call_id"].tolist()):
            if batch is None:
                continue
            members = [number + at for at in range(end - begin) if batch.alive[number + at]]
            if batch.kind == "widen":
                targets = [(batch.details[each], int(columns.first_row[begin + each - number])) for each in members]
                self._take_wider(columns, batch.role, targets)
            else:
                self._take_extended(columns, batch, [(each, begin + each - number) for each in members])
            for each in members:
                self._calls.end(batch, each)

    def _take_extended(self, columns: _RowColumns, batch: Batch, calls: Sequence[tuple[int, int]]) -> None:
        """Store the rows of extends. calls: number in the batch, and item in the message."""
        role = batch.role
        frames: dict[Frame, list[tuple[LogitsRow, int, float]]] = {}
        for number, item in calls:
            window, sent = batch.callers[number], batch.details[number]
            window.answered.add(role)
            if role == window.drafting_role and not window.rows:
                self._request_rows(window, [])  # no draft came
            self._place()
            if role in window.oldest:
                self._take_aligned(columns, window, role, item, sent.start)
                continue
            if role not in window.required:
                continue
            first, reads = window.first[role] - sent.start, window.reads[role]
            count, source = int(columns.rows[item]), int(columns.first_row[item])
            for row in window.rows[window.next :]:
                at = first + reads[row.index]
                if 0 <= at < count:  # drafts may have been cut
                    frames.setdefault(row.frame, []).append((row, source + at, sent.temperature))
        for frame, members in frames.items():
            self._store(columns, frame, role, members)

    def _store(
        self, columns: _RowColumns, frame: Frame, role: Role, members: Sequence[tuple[LogitsRow, int, float]]
    ) -> None:
        """Store slices of a role in a frame. members: row, its number among the message's rows, temperature."""
        rows, sources, temperatures = zip(*members, strict=True)
        at, too_narrow = row_numbers([row.at for row in rows]), self._too_narrow(rows[0], role)
        part = ONLY_REQUIRED if too_narrow else ALL
        theirs = self._vocabularies.plain_map(frame.shape.primary, role).to_primary
        frame.block.store_rows(
            role, at, columns.sent, row_numbers(sources), part, theirs, np.array(temperatures, np.float64)
        )
        if too_narrow:  # the rows were widened before the role was extended again
            for row in rows:
                row.widen(row.k)
            self._request_wider(rows, role)
            return
        frame.receive(role, at)
        late = at[frame.stage[at] == RowStage.LOOKING_UP]
        if len(late):
            frame.block.add_events(role, late)
        self._touched[frame] = None

    def _take_wider(self, columns: _RowColumns, role: Role, targets: Sequence[tuple[LogitsRow, int]]) -> None:
        """Store wider slices. targets: row, and its number among the message's rows."""
        frames: dict[Frame, list[tuple[LogitsRow, int]]] = {}
        for row, number in targets:
            if role in row.window.oldest:
                self._add_aligned(row, role, columns.slice(number))
            else:
                frames.setdefault(row.frame, []).append((row, number))
        for frame, members in frames.items():
            at, source = row_numbers([row.at for row, _ in members]), row_numbers([number for _, number in members])
            theirs = self._vocabularies.plain_map(frame.shape.primary, role).to_primary
            frame.block.store_rows(role, at, columns.sent, source, ONLY_SLICES, theirs, np.ones(len(at)))
            frame.receive(role, at)
            self._touched[frame] = None

    def _take_aligned(
        self, columns: _RowColumns, window: VerificationWindow, role: Role, item: int, start: int
    ) -> None:
        """Store the rows of an extend of a small model with another vocabulary, in its own ids."""
        first, count = int(columns.first_row[item]), int(columns.rows[item])
        slices = [columns.slice(first + number) for number in range(count)]
        history = window.active.row_histories.setdefault(role, RowHistory())
        used = window.first[role] + len(window.hashes[role])  # more may have been drafted
        for position, part in zip(range(start, used), slices):  # noqa: B905
            history.add(window.key(role, position), part)
        for row in window.rows[window.next :]:
            at = row.position(role) - start
            if 0 <= at < count:  # drafts may have been cut
                self._take_slice(row, role, slices[at])

    def _take_slice(self, row: LogitsRow, role: Role, part: RowSlice) -> None:
        """Store the slice of a role with another vocabulary, or request a wider one if the row has been widened."""
        if self._too_narrow(row, role):
            row.widen(row.k)  # the row was widened before the role was extended again
            self._request_wider([row], role)
        else:
            self._add_aligned(row, role, part)

    def _add_aligned(self, row: LogitsRow, role: Role, part: RowSlice) -> None:
        if (crossing := row.crossing.get(role)) is not None:
            history, window = row.window.active.row_histories[role], row.window
            for number in range(crossing.rows):
                earlier = history.get(window.key(role, crossing.boundaries.first - 1 + number))
                assert earlier is not None
                crossing.sums[number] = earlier.logsumexp
        row.slices[role] = part
        if role in row.events:  # the candidates were known before
            events, number = row.events[role]
            events.add_slice(number, part)
        if role == "guider_base" or row.k == WHOLE:  # a guider's slice counts once its proposals are stored
            row.frame.receive(role, row.at)
        self._touched[row.frame] = None

    def _take_values(self, message: Values) -> None:
        """Store the replies to lookups."""
        ends = np.cumsum(message.items["values"]).tolist()
        for begin, end, batch, number in self._calls.find(message.items["call_id"].tolist()):
            if batch is None or batch.kind != "lookup":
                continue
            calls = [(number, number + end - begin)]
            if 0 in batch.alive[number : number + end - begin]:
                calls = [(each, each + 1) for each in range(number, number + end - begin) if batch.alive[each]]
            for first, last in calls:
                before = begin + first - number
                values = message.values[ends[before - 1] if before else 0 : ends[begin + last - number - 1]]
                batch.details.take(values, first, last)
                for each in range(first, last):
                    self._calls.end(batch, each)
            self._touched[batch.details.frame] = None

    def _take_refusals(self, message: Refused) -> list[Fault]:
        """Remove refused calls. Returns one fault for each session and role.

        A row whose lookup was refused stays incomplete: the fault makes it be extended again.
        """
        faults: dict[tuple[int, Role], Fault] = {}
        codes, details = message.items["code"].tolist(), message.items["detail"].tolist()
        for begin, end, batch, number in self._calls.find(message.items["call_id"].tolist()):
            for at in range(begin, end):
                if batch is None or not batch.alive[number + at - begin]:
                    continue
                active = batch.callers[number + at - begin].active
                self._calls.end(batch, number + at - begin)
                # The refusal of an extend is the cause of those of the lookups that waited for it.
                if batch.kind == "extend" or (active.key, batch.role) not in faults:
                    faults[active.key, batch.role] = Fault(active, batch.role, Refusal(codes[at]), details[at])
        return list(faults.values())

    def _take_drafts(self, message: Drafted) -> None:
        drafted = drafted_items(message)
        for begin, end, batch, number in self._calls.find([call_id for call_id, _ in drafted]):
            for at in range(begin, end):
                if batch is None or not batch.alive[number + at - begin]:
                    continue
                window, tokens = batch.callers[number + at - begin], drafted[at][1]
                if not window.rows:
                    drafts = window.active.session.translators["guider"].drafts_in_target(tokens)
                    self._request_rows(window, drafts, tokens)


def _extend_columns(first: int, role: Role, members: Sequence[PendingExtend]) -> ExtendColumns:
    """The items of extends for one replica. first: id of the first call."""
    sessions = [each.window.active for each in members]
    streams = [active.session.streams[role] for active in sessions]
    items = np.empty(len(members), EXTEND_ITEM)
    items["call_id"] = np.arange(first, first + len(members))
    items["session"] = [active.key for active in sessions]
    items["age"] = [active.age for active in sessions]
    items["prefix"] = [stream.hash_before(each.position) for stream, each in zip(streams, members, strict=True)]
    items["epoch"] = [active.epoch for active in sessions]
    items["position"] = [each.position for each in members]
    items["tokens"] = [len(each.tokens) for each in members]
    items["rows"] = [each.rows for each in members]
    items["k"] = [each.k for each in members]
    items["required_ids"] = [len(each.required_ids) for each in members]
    items["keep"] = [each.keep for each in members]
    items["temperature"] = [each.temperature for each in members]
    return ExtendColumns(
        items,
        [token for each in members for token in each.tokens],
        [each.required_ids for each in members],
        {place: each.draft for place, each in enumerate(members) if each.draft is not None},
    )


class _RowColumns:
    """The rows of a message by number. width: logits in a whole row of this model."""

    def __init__(self, message: Rows, width: int) -> None:
        items = message.items
        self.rows = np.ascontiguousarray(items["rows"])
        self.first_row = np.cumsum(self.rows) - self.rows
        ks, required = np.ascontiguousarray(items["k"]), np.ascontiguousarray(items["required_ids"])
        if len(items) and min(self.rows.min(), required.min()) < 0:
            raise ProtocolError("Rows.items has a negative count")
        starts, pages = np.empty((int(self.rows.sum()), 4), np.int64), page_counts(width)
        lengths = locate_rows(self.rows, ks, required, width, starts)
        columns = [_read_only(each) for each in (message.ids, message.pages, message.logits)]
        columns += [_read_only(each) for each in (message.logsumexp, message.tempered, message.required)]
        expected = lengths[0], len(starts) * pages, lengths[1], len(starts), len(starts), lengths[2]
        if tuple(map(len, columns)) != expected:
            raise ProtocolError("the columns of Rows do not fit its items")
        self.sent = SentRows(starts, columns[0], columns[1], pages, *columns[2:])
        self._message, self._width = message, width
        self._ids: Ids | None = None  # joined when they are needed

    def slice(self, source: int) -> RowSlice:
        """One row in the model's own ids."""
        k, id_at, logit_at, _ = self.sent.starts[source].tolist()
        if self._ids is None:
            self._ids = rows_ids(self._message, self._width)
        ids = np.arange(self._width) if k == WHOLE else self._ids[id_at : id_at + k]
        logits = self.sent.logits[logit_at : logit_at + len(ids)]
        return RowSlice(ids, logits, np.zeros(0), float(self.sent.logsumexp[source]))


def _read_only(values: NDArray[Any]) -> NDArray[Any]:
    """The same values, as kernels take them: arrays of messages cannot be written to."""
    if values.flags.writeable:
        values = values.view()
        values.flags.writeable = False
    return values
