"""Sends extend, lookup and widen requests to replicas and collects their logits, for many sessions at once.

Candidates are joined in `actors.coordinator.candidates`. A row's candidates do not depend on the order of arrival. What
a turn begins is requested together, by `request`: rows of one shape share a frame, and calls to one role a batch.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from operator import add
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from actors.api.generation import Role
from actors.api.sampling_params import Sampling
from actors.config import Exchange as ExchangeConfig
from actors.coordinator.candidates import GUIDED, CandidateCompleter, Frame
from actors.coordinator.frames import FrameShape, RowFrame, RowKeys, row_numbers
from actors.coordinator.inflight import Calls, ExtendCalls, InflightCalls, Lookups, Widenings
from actors.coordinator.received_rows import ReceivedRows
from actors.coordinator.replica_pool import Replica
from actors.coordinator.session import ActiveSession, HiddenDrafts, LogitsRow, RowHistory, Source, VerificationWindow
from actors.coordinator.states import RowStage
from actors.coordinator.table import SessionTable
from actors.coordinator.verification import MAX_LEGAL
from actors.decoding.candidates import Answered, BlockLayout, Ids, RowSlice, Stages
from actors.decoding.cross_vocab.logprobs import CrossingRows
from actors.decoding.cross_vocab.translators import NO_DRAFTS, DraftTranslation
from actors.decoding.decision import choose, spec_columns
from actors.decoding.hashing import extend_hashes, prefix_hash
from actors.decoding.kernels import ALL, ALONE, ONLY_REQUIRED, ONLY_SLICES
from actors.decoding.vocabulary import RequiredLogits
from actors.text.vocabularies import VocabularyRegistry
from actors.wire.columns import NO_IDS, Draft, ExtendColumns, RowRequest, drafted_items
from actors.wire.messages import (
    EXTEND_ITEM,
    WHOLE,
    Drafted,
    Forked,
    Message,
    ProtocolError,
    Refusal,
    Refused,
    Rows,
    Values,
)

_SHAPES = 256  # required logits, and shapes of frames, that are kept


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
    """An extend that is sent for itself: `tokens` from `position` of the role's stream on.

    prefix: running hash of the tokens before. start: position of the first row whose logits are requested.
    temperature: of their tempered logsumexp.
    """

    window: VerificationWindow | HiddenDrafts
    position: int
    prefix: int
    tokens: list[int]
    rows: int
    k: int
    required_ids: NDArray[np.int32]
    draft: Draft | None
    keep: int
    start: int
    temperature: float


class ArrivedRows(NamedTuple):
    """The rows with which a role answered an extend that was sent for itself: item `item` of `columns`."""

    sent: PendingExtend
    columns: ReceivedRows
    item: int


class Exchange:
    """Requests the logits rows of one coordinator's sessions, and collects the replies."""

    def __init__(self, config: ExchangeConfig, vocabularies: VocabularyRegistry) -> None:
        self._config, self._vocabularies = config, vocabularies
        self._table = SessionTable()
        self._touched: dict[Frame, None] = {}
        self._unplaced: list[VerificationWindow] = []  # windows whose rows have no frame yet
        self._begun: list[VerificationWindow] = []  # windows whose rows were requested since `take_begun`
        self._widened: list[LogitsRow] = []  # rows whose wider slices are not requested yet
        # By role, and by the window or hidden drafts that wait: a later extend replaces one that is not sent yet.
        self._extends: dict[Role, dict[VerificationWindow | HiddenDrafts, PendingExtend]] = {}
        self._arrived: list[
            tuple[VerificationWindow, Role, ArrivedRows]
        ] = []  # perhaps before the window's rows have a frame
        # windows whose lookups of earlier rows are not sent yet
        self._crossing_pending: dict[VerificationWindow, None] = {}
        self._calls = InflightCalls()
        self._shapes: dict[tuple[object, ...], FrameShape] = {}
        self._required_by_role = lru_cache(_SHAPES)(self._shared_required)
        self._completer = CandidateCompleter(config.k, vocabularies, self._calls)

    def admit(self, active: ActiveSession) -> None:
        """Give an admitted session its slot. Call before its first window."""
        request = active.session.request
        spec = spec_columns([(ALONE, 0.0, request.sampling, request.seed, 0)])
        active.slot = self._table.add(active.key, active.age, active.epoch, spec)

    def release(self, active: ActiveSession) -> None:
        """Forget a session."""
        self.drop(active)
        self._forget_hidden(active)
        if active.slot >= 0:
            self._table.remove(active.slot)
            active.slot = -1

    # -- requests --------------------------------------------------------------------------------------------------

    def request(self) -> None:
        """Put what was begun since the last call into the outboxes of the replicas. Call before these are sent."""
        self._place()
        self._store_arrived()
        self._place_widened()
        crossing, self._crossing_pending = self._crossing_pending, {}
        self._completer.look_up_crossing_rows(window for window in crossing if window.active.window is window)
        extends, self._extends = self._extends, {}
        for role, pending in extends.items():
            by_replica: dict[Replica, list[PendingExtend]] = {}
            for each in pending.values():
                if each.window.current:  # else it has ended
                    by_replica.setdefault(each.window.active.replicas[role], []).append(each)
            for replica, members in by_replica.items():
                first = self._calls.extend(ExtendCalls(role, [each.window for each in members], members))
                replica.outbox.extends.append(_extend_columns(first, members))

    def begin(
        self,
        active: ActiveSession,
        guided: bool,
        text_drafts: Sequence[int] = (),
        guider_drafts: int = 0,
        to_hide: int = 0,
        source: Source = "text",
    ) -> None:
        """Begin the session's next window. The session is bound to a replica of every role that takes part.

        text_drafts: drafts of a source other than the guider, in the primary's ids. guider_drafts: number to request
        from the guider instead; if it has made drafts already, these are taken. to_hide: number that it drafts for the
        window after this one meanwhile.
        """
        required = self._required(active, guided)
        window = active.window = VerificationWindow(
            active, guided, required, "guider" if guider_drafts else None, guider_drafts, to_hide=to_hide, source=source
        )
        if active.hidden_drafts is not None and self._take_hidden(window, active.hidden_drafts):
            return
        if guided and active.session.retokenizes:
            needed = {role: translator.oldest_needed_row() for role, translator in active.session.translators.items()}
            window.oldest = {role: oldest for role, oldest in needed.items() if oldest is not None}
        if (
            guider_drafts and window.aligned and not self._ready_to_draft(window)
        ):  # request the missing rows without drafts first
            window.drafting_role, guider_drafts = None, 0
            window.awaited = dict.fromkeys(required)
        if guider_drafts:
            self._request_drafts(window)
        else:
            self._request_rows(window, text_drafts)

    def read_prompt(self, active: ActiveSession, guided: bool, reads: Mapping[Role, Sequence[int]]) -> None:
        """Request whole rows inside the prompt. reads: number of its tokens that each role has read at each row."""
        window = active.window = VerificationWindow(active, guided, self._required(active, guided), scores_prompt=True)
        streams = active.session.streams
        window.reads = {role: [end - reads[role][0] for end in reads[role]] for role in window.roles}
        window.draft_tokens = {role: streams[role].tokens[reads[role][0] : reads[role][-1]] for role in window.roles}
        for role in window.roles:
            first, last = reads[role][0] - 1, reads[role][-1]
            window.first[role] = first
            window.hashes[role] = [streams[role].hash_before(end) for end in range(first + 1, last + 1)]
        window.rows = [LogitsRow(window, index, WHOLE) for index in range(len(reads[active.primary]))]
        self._unplaced.append(window)
        for role in window.roles:
            self._extend(window, role)

    def _required(self, active: ActiveSession, guided: bool) -> Mapping[Role, RequiredLogits]:
        """Required ids of the rows in the session's next window, by role."""
        lifted = active.session.required_ids()
        forced = tuple(sorted(lifted & self._vocabularies.legal(active.primary))) if lifted else ()
        return self._required_by_role(active.primary, guided, active.session.request.thinking.end, forced)

    def _shared_required(
        self, primary: Role, guided: bool, end: str, forced: tuple[int, ...]
    ) -> Mapping[Role, RequiredLogits]:
        """Required ids by role; rows of one frame have the same. end: text that ends the thinking. forced: more ids."""
        roles = GUIDED if guided else (primary,)
        return {role: self._vocabularies.required(primary, role, end, forced) for role in roles}

    def extend_again(self, active: ActiveSession, role: Role, held: int) -> None:
        """Request a role's rows of the window again. held: tokens that its replica holds."""
        self._place()
        self._store_arrived()
        window = active.window
        assert window is not None
        stream = active.session.streams[role]
        stream.lose(min(held, len(stream) - 1))
        active.row_histories.pop(role, None)
        self._calls.forget_extend(window, role)
        window.awaited[role] = None
        for row in window.rows[window.next :]:
            self._calls.forget_rows(row.frame, row.at, widenings_to=role)
            row.lose(role)
            self._touched[row.frame] = None
        self._extend(window, role)
        if window.aligned:
            self._crossing_pending[window] = None

    def extend_ahead(self, active: ActiveSession, role: Role) -> None:
        """Extend a role by tokens whose rows are not needed. No reply is awaited: lost tokens are sent again later."""
        stream = active.session.streams[role]
        if tokens := stream.tokens[stream.held :]:
            prefix, call_id = stream.hash_before(stream.held), self._calls.unawaited_id()
            row = call_id, active.key, active.age, prefix, active.epoch, stream.held, len(tokens), 0, 0, 0, 0, 1.0
            columns = ExtendColumns(np.array([row], EXTEND_ITEM), tokens, NO_IDS, {})
            active.row_histories.pop(role, None)
            active.replicas[role].outbox.extends.append(columns)
            stream.hold(len(stream))

    def widen(self, row: LogitsRow, k: int) -> None:
        """Request wider slices of a row (WHOLE: the whole row of every role)."""
        row.widen(k)
        self._widened.append(row)

    def look_up(self, row: LogitsRow, ids: Sequence[int]) -> None:
        """Request the logits of all ids that a grammar allows for a row, at most MAX_LEGAL."""
        row.complete_with(ids)
        self._widened.append(row)

    def take_begun(self) -> list[VerificationWindow]:
        """The windows whose rows were requested since the last call."""
        begun, self._begun = self._begun, []
        return begun

    def drop(self, active: ActiveSession) -> None:
        """Forget the session's window and its calls in flight."""
        window = active.window
        if window is not None:
            for role in window.awaited:
                self._calls.forget_extend(window, role)
            for row in window.rows:
                if row.at >= 0 and row.frame.calls and not row.complete:
                    self._calls.forget_rows(row.frame, row.at)
            window.dissolve()
            active.window = None

    def _forget_hidden(self, active: ActiveSession) -> None:
        hidden, active.hidden_drafts = active.hidden_drafts, None
        if hidden is not None:
            self._calls.forget_extend(hidden, "guider")

    def _take_hidden(self, window: VerificationWindow, hidden: HiddenDrafts) -> bool:
        """Begin a window with the drafts that the guider has made, or is making, if they fit. Else forget them."""
        active = window.active
        if window.drafting_role is None or not hidden.fit():
            self._forget_hidden(active)
            return False
        active.hidden_drafts = None
        window.hidden, window.wanted = True, hidden.wanted
        window.hashes["guider"] = [self._begin_role(window, "guider")]
        if call := hidden.awaited["guider"]:
            calls, number = window.awaited["guider"] = call
            calls.windows[number] = window
        if hidden.tokens is not None:
            self._draft(window, hidden.tokens)
        if hidden.rows is not None:
            self._take_answers("guider", [(window, hidden.rows)])
        return True

    def _draft_on(self, answers: Sequence[tuple[VerificationWindow, ArrivedRows]]) -> None:
        """Let the guider draft behind windows that the other roles verify, as if they accepted all of its drafts.

        answers: the rows of each window's drafts. From the last of them the next token is guessed.
        """
        lasts = [of.columns.slice(int(of.columns.first_row[of.item]) + window.drafts) for window, of in answers]
        drafts = [draft for _, of in answers if (draft := of.sent.draft) is not None]
        how = [Sampling(temperature=draft.temperature, top_p=draft.top_p) for draft in drafts]
        noise = [draft.position + window.drafts for (window, _), draft in zip(answers, drafts, strict=True)]
        ids, logits = np.stack([last.ids for last in lasts]), np.stack([last.logits for last in lasts])
        tokens = choose(ids, logits, how, [draft.seed for draft in drafts], noise).tolist()
        for (window, of), draft, token, position in zip(answers, drafts, tokens, noise, strict=True):
            active, session = window.active, window.active.session
            guess = session.translators["guider"].drafts_in_target([token])
            if not guess or guess[0] in session.vocabulary.eos_ids:
                continue
            first, before = window.first["guider"] + len(window.rows), window.hashes["guider"][window.drafts]
            hidden = active.hidden_drafts = HiddenDrafts(active, first, prefix_hash(before, token), window.to_hide)
            ahead = draft._replace(drafts=window.to_hide, position=position + 1)
            extend = of.sent._replace(window=hidden, position=first, prefix=before, tokens=[token], draft=ahead)
            self._extends.setdefault("guider", {})[hidden] = extend._replace(keep=len(window.rows), start=first)

    def _place(self) -> None:
        """Put the rows of windows that were begun into frames, those of one shape into one, and extend them."""
        unplaced, self._unplaced = self._unplaced, []
        by_shape: dict[FrameShape, list[VerificationWindow]] = {}
        for window in unplaced:
            if window.rows:
                by_shape.setdefault(self._shape(window, window.rows[0].k), []).append(window)
        self._begun += [window for windows in by_shape.values() for window in windows]
        for shape, windows in by_shape.items():
            frame = self._frame([row for window in windows for row in window.rows], shape, RowStage.EXTENDING)
            if not (shape.aligned or shape.scores_prompt):  # these need more than the newest rows
                self._extend_frame(frame, windows)

    def _shape(self, window: VerificationWindow, k: int, all_legal: bool = False) -> FrameShape:
        """Shape of a frame for the window's rows of width k. Windows with the same required logits share it."""
        required = window.required
        key = id(required), window.guided, window.aligned, window.scores_prompt, k, all_legal
        shape = self._shapes.get(key)
        if shape is None:  # it holds the required logits, so their id stays theirs
            proposing: Sequence[Role] = tuple(required)
            if window.scores_prompt:
                proposing = ()
            elif window.guided and k != WHOLE:
                proposing = GUIDED[:2]
            widths = {role: self._slice_width(window, role, k) for role in required}
            layout = BlockLayout(required, widths, MAX_LEGAL if all_legal else 0)
            shape = FrameShape(required, *key[1:], proposing, layout)
            if len(self._shapes) >= _SHAPES:
                self._shapes.clear()
            self._shapes[key] = shape
        return shape

    def _frame(self, rows: Sequence[LogitsRow], shape: FrameShape, stage: RowStage) -> Frame:
        """Put rows into a frame."""
        frame = RowFrame(rows, shape, self._keys(rows, tuple(shape.required)), stage)
        for at, row in enumerate(rows):
            row.place(frame, at)
        return frame

    def _keys(self, rows: Sequence[LogitsRow], roles: Sequence[Role]) -> RowKeys:
        windows = [row.window for row in rows]
        actives = [window.active for window in windows]
        indices = [row.index for row in rows]
        replicas = [[active.replicas[role].number for active in actives] for role in roles]
        reads = [[window.reads[role][index] for window, index in zip(windows, indices, strict=True)] for role in roles]
        firsts = [[window.first[role] for window in windows] for role in roles]
        prefixes = [
            [window.hashes[role][read] for window, read in zip(windows, of_role, strict=True)]
            for role, of_role in zip(roles, reads, strict=True)
        ]
        return RowKeys(
            self._table.rows[[active.slot for active in actives]],
            np.array(replicas, np.int64),
            np.array(firsts, np.int64) + np.array(reads, np.int64),
            np.array(prefixes, np.uint64),
        )

    def _extend_frame(self, frame: Frame, windows: Sequence[VerificationWindow]) -> None:
        """Send every role the newest tokens of windows, and the drafts behind them, and request all rows of a frame.

        Example: the stream has 21 tokens, of which the replica holds 19, and the drafts are [7, 8]. Tokens 19 and 20,
        then 7 and 8, are sent from position 19 on; the rows of the last three tokens (positions 20, 21, 22) are
        requested. The role that drafted has its drafts already.
        """
        rows = row_numbers([window.rows[0].at for window in windows])
        counts = row_numbers([len(window.rows) for window in windows])
        sessions = frame.keys.sessions[rows]
        items = np.zeros((len(frame.shape.required), len(windows)), EXTEND_ITEM)
        items["session"], items["age"], items["epoch"] = sessions["key"], sessions["age"], sessions["epoch"]
        items["rows"], items["temperature"] = counts, 1.0
        items["temperature"][0] = frame.heats[rows]
        for number, (role, required) in enumerate(frame.shape.required.items()):
            of_role = items[number]
            of_role["k"], of_role["required_ids"] = self._width(windows[0], role), len(required.ids)
            asked = [at for at, window in enumerate(windows) if window.drafting_role != role]
            by_replica: dict[Replica, list[int]] = {}
            for at in asked:
                by_replica.setdefault(windows[at].active.replicas[role], []).append(at)
            for replica, places in by_replica.items():
                part: list[int] | slice = slice(None) if len(places) == len(windows) else places
                members = [windows[at] for at in places]
                streams = [window.active.session.streams[role] for window in members]
                firsts = [window.first[role] for window in members]
                held = [min(stream.held, first) for stream, first in zip(streams, firsts, strict=True)]
                sent = [
                    stream.tokens[begin : first + 1] + list(window.draft_tokens[role])
                    for stream, begin, first, window in zip(streams, held, firsts, members, strict=True)
                ]
                calls = ExtendCalls(role, members, (), frame, rows[part], counts[part])
                first_call, its_items = self._calls.extend(calls), of_role[part]
                its_items["call_id"] = range(first_call, first_call + len(members))
                its_items["prefix"] = [stream.hash_before(begin) for stream, begin in zip(streams, held, strict=True)]
                its_items["position"], its_items["tokens"] = held, [len(tokens) for tokens in sent]
                flat = [token for tokens in sent for token in tokens]
                ids = required.ids if len(members) == 1 else np.tile(required.ids, len(members))
                replica.outbox.extends.append(ExtendColumns(its_items, flat, ids, {}))

    def _slice_width(self, window: VerificationWindow, role: Role, k: int) -> int:
        """The most ids that a role proposes for a row, in ids of the primary."""
        if window.aligned and role != window.active.primary:  # tokens of its slice, and boundary-crossing tokens
            return k + self._config.k if role == "guider" and k != WHOLE else 0
        if k == WHOLE:
            return self._vocabularies.width(role)
        return 0 if role == "guider_base" and window.guided else min(k, self._vocabularies.width(role))

    def _place_widened(self) -> None:
        """Move widened rows into frames of their new width, and request the wider slices."""
        widened, self._widened = self._widened, []
        by_shape: dict[tuple[FrameShape, RowStage], list[LogitsRow]] = {}
        for row in widened:
            if row in row.window.rows:  # else the window has ended
                key = self._shape(row.window, row.k, bool(row.legal_ids)), RowStage(row.frame.stage[row.at])
                by_shape.setdefault(key, []).append(row)
        for (shape, stage), rows in by_shape.items():
            narrow = [(row.frame, row.at) for row in rows]
            frame = self._frame(rows, shape, stage)
            for row, (before, at) in zip(rows, narrow, strict=True):
                if shape.all_legal:
                    frame.block.copy_slices(row.at, before.block, at)
                    frame.block.propose(row.at, row_numbers(row.legal_ids))
                else:
                    frame.block.copy_required(row.at, before.block, at)
                before.abandon(at)
            if shape.all_legal:
                for role in shape.required:
                    frame.receive(role, np.arange(len(rows)))
                complete = self._completer.advance(frame)
                assert not len(complete)  # a row that lacks no legal id has been decided
                continue
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
        """Request the wider slices of rows of one frame."""
        at, frame = row_numbers([row.at for row in rows]), rows[0].frame
        first = self._calls.ask(Widenings(role, frame, at, list(rows)))
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
        """Request the rows behind the drafts, up to the first one that the session's grammar does not allow."""
        if drafts and (grammar := window.active.session.grammar) is not None:
            ends = window.active.session.vocabulary.eos_ids  # with ignore_eos a grammar does not go on by them
            before_end = next((place for place, token in enumerate(drafts) if token in ends), len(drafts))
            drafts = drafts[: grammar.legal_length(drafts[:before_end])]
        k = WHOLE if self._config.mode == "full" else self._config.k
        self._unplaced.append(window)
        if not (drafts or window.oldest or window.drafting_role):
            for role in window.required:
                window.hashes[role] = (self._begin_role(window, role),)
            window.rows = [LogitsRow(window, 0, k)]
            return
        ahead = self._translate_drafts(window, drafts, drafted)
        window.rows = [LogitsRow(window, index, k) for index in range(len(ahead[window.active.primary].ends))]
        window.draft_tokens = {role: part.tokens for role, part in ahead.items()}
        window.reads = {role: part.ends for role, part in ahead.items()}
        for role, part in ahead.items():
            begun = self._begin_role(window, role)
            window.hashes[role] = [begun, *extend_hashes(begun, part.tokens)]
            if role in window.oldest:
                for row, boundaries in zip(window.rows, part.boundaries_by_row, strict=True):
                    if boundaries is not None:
                        row.crossing[role] = CrossingRows(boundaries)
        if window.aligned:
            for role in window.roles:
                if role != window.drafting_role:
                    self._extend(window, role)
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
        """Send one role of one window its newest tokens, as `_extend_frame`, but with parameters of its own.

        A role with another vocabulary also needs earlier rows, from window.oldest on: rows that its history holds are
        taken from there, and `fresh` is the first position whose row is requested.
        """
        active, needed, first = window.active, window.required.get(role), window.first[role]
        stream, tail = active.session.streams[role], window.draft_tokens[role]
        end, fresh, keep = first + 1 + len(tail), first, 0
        if role in window.oldest:
            history, key_of = active.row_histories.setdefault(role, RowHistory()), partial(window.key, role)
            reach = history.reach(window.oldest[role], end, key_of)
            fresh = min(reach, max(stream.held, window.oldest[role]), first if draft is not None else end)
            keep = history.kept(fresh, key_of) if fresh <= stream.held else 0
            if fresh == end:  # no new token, and every row is held
                window.take_answer(role)
            self._take_held_rows(window, role, history, fresh)
            if fresh == end:
                return
        elif active.row_histories:
            active.row_histories.pop(role, None)  # the replica keeps none of these rows
        position = min(stream.held, fresh)
        tokens = [*stream.tokens[position : first + 1], *tail]
        k = self._width(window, role)
        ids = needed.ids if needed is not None else NO_IDS
        rows = end - fresh
        heat = self._temperature(window, role)
        requested = position, stream.hash_before(position), tokens, rows, k, ids, draft, keep, fresh, heat
        self._extends.setdefault(role, {})[window] = PendingExtend(window, *requested)

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
            elif isinstance(message, Forked):
                self._take_forked(message)
            elif isinstance(message, Refused):
                faults += self._take_refusals(message)
        return faults

    def advance(self) -> list[VerificationWindow]:
        """Request what touched rows still lack. Returns the windows among theirs whose next row is complete."""
        self._store_arrived()
        touched, self._touched = list(self._touched), {}
        windows: dict[VerificationWindow, None] = {}
        for frame in touched:
            for row in frame.owners_of(self._completer.advance(frame)):
                windows[row.window] = None
        return [window for window in windows if window.ready()]

    def _take_rows(self, message: Rows, replica: Replica) -> None:
        """Store the rows of extends and widenings, those of one frame together."""
        replica.forward_time.observe(message.packed, message.micros / 1e6)
        columns = ReceivedRows(message, replica.welcome.width)
        for calls, numbers, items in self._calls.find(message.items["call_id"]):
            if isinstance(calls, ExtendCalls) and calls.frame is not None:
                self._take_frame(columns, calls, numbers, items)
            elif isinstance(calls, ExtendCalls):
                windows = [calls.windows[number] for number in numbers]
                sent = [calls.details[number] for number in numbers]
                rows = [ArrivedRows(how, columns, item) for how, item in zip(sent, items.tolist(), strict=True)]
                self._take_answers(calls.role, list(zip(windows, rows, strict=True)))
            elif isinstance(calls, Widenings):
                owners = [calls.owners[number] for number in numbers]
                self._take_wider(columns, calls.role, list(zip(owners, items.tolist(), strict=True)))
            self._calls.end(calls, numbers)

    def _take_frame(
        self, columns: ReceivedRows, calls: ExtendCalls[VerificationWindow], numbers: Ids, items: Ids
    ) -> None:
        """Store the rows of extends of whole windows: those of `numbers`, answered by `items` of the message."""
        role, frame = calls.role, calls.frame
        assert frame is not None
        assert calls.rows is not None
        assert calls.counts is not None
        for number in numbers.tolist():
            calls.windows[number].take_answer(role)
        answered = Answered(items, numbers, calls.rows, calls.counts)
        k = min(self._width(calls.windows[0], role), columns.width)
        theirs = self._vocabularies.plain_map(frame.shape.primary, role).to_primary
        rows = Stages(frame.stage, frame.arrived)
        late = frame.block.store_answers(role, columns.columns, answered, k, theirs, frame.heats, rows)
        if late < 0:
            raise ProtocolError(
                f"the {role} model sent slices of another width, or other numbers of rows or required logits, than was "
                "requested"
            )
        if late:
            first, counts = calls.rows[numbers].tolist(), calls.counts[numbers].tolist()
            self._received(frame, role, np.concatenate(list(map(np.arange, first, map(add, first, counts)))))
        self._touched[frame] = None

    def _received(self, frame: Frame, role: Role, at: Ids) -> None:
        """A role's slices of these rows are stored, perhaps after their candidates were found."""
        frame.receive(role, at)
        late = at[frame.stage[at] == int(RowStage.LOOKING_UP)]
        if len(late):
            frame.block.add_events(role, late)
        self._touched[frame] = None

    def _take_answers(
        self, role: Role, answers: Sequence[tuple[VerificationWindow | HiddenDrafts, ArrivedRows]]
    ) -> None:
        """Take the answers of a role to extends that were sent for themselves, all in one message."""
        to_draft_on = []
        for window, of in answers:
            if isinstance(window, HiddenDrafts):
                window.awaited[role], window.rows = None, of
                continue
            of.columns.check(np.array([of.item]), of.sent.k, len(of.sent.required_ids))
            window.take_answer(role)
            if role == window.drafting_role:
                if not window.rows:
                    self._request_rows(window, [])  # no draft came
                drafted = of.sent.draft is not None and window.drafts + 1 == of.columns.rows[of.item]
                if window.to_hide and drafted and not (window.aligned or window.active.hidden_drafts):
                    to_draft_on.append((window, of))
            if role in window.required:
                self._arrived.append((window, role, of))
        if to_draft_on:
            self._draft_on(to_draft_on)

    def _store_arrived(self) -> None:
        """Store the rows that have arrived for windows whose rows have a frame by now."""
        arrived, self._arrived = self._arrived, []
        groups: dict[tuple[ReceivedRows, Frame, Role], list[tuple[LogitsRow, int, float]]] = {}
        for window, role, of in arrived:
            if not window.rows:
                continue  # it has ended
            if window.rows[0].at < 0:
                self._arrived.append((window, role, of))
                continue
            sent, columns, item = of
            if role in window.oldest:
                self._take_aligned(columns, window, role, item, sent.start)
                continue
            first, reads = window.first[role] - sent.start, window.reads[role]
            count, source = int(columns.rows[item]), int(columns.first_row[item])
            for row in window.rows[window.next :]:
                at = first + reads[row.index]
                if 0 <= at < count:  # drafts may have been cut
                    groups.setdefault((columns, row.frame, role), []).append((row, source + at, sent.temperature))
        for (columns, frame, role), members in groups.items():
            self._store(columns, frame, role, members)

    def _store(
        self, columns: ReceivedRows, frame: Frame, role: Role, members: Sequence[tuple[LogitsRow, int, float]]
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
        self._received(frame, role, at)

    def _take_wider(self, columns: ReceivedRows, role: Role, targets: Sequence[tuple[LogitsRow, int]]) -> None:
        """Store wider slices. targets: row, and the item of the message that answers it."""
        frames: dict[Frame, list[tuple[LogitsRow, int]]] = {}
        for row, item in targets:
            columns.check(np.array([item]), row.k, 0)
            if columns.rows[item] != 1:
                raise ProtocolError(f"the {role} model sent {columns.rows[item]} rows in place of one wider slice")
            number = int(columns.first_row[item])
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
        self, columns: ReceivedRows, window: VerificationWindow, role: Role, item: int, start: int
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
        counts = message.items["values"]
        if counts.sum() != len(message.values):
            raise ProtocolError(f"Values counts {counts.sum()} values, its column has {len(message.values)}")
        for calls, numbers, items in self._calls.find(message.items["call_id"]):
            if isinstance(calls, Lookups):
                calls.take(message.values, counts, numbers, items)
                self._touched[calls.frame] = None
                self._calls.end(calls, numbers)

    def _take_refusals(self, message: Refused) -> list[Fault]:
        """Remove refused calls. Returns one fault for each session and role.

        A row whose lookup was refused stays incomplete: the fault makes it be extended again.
        """
        faults: dict[tuple[int, Role], Fault] = {}
        codes, details = message.items["code"].tolist(), message.items["detail"].tolist()
        for calls, numbers, items in self._calls.find(message.items["call_id"]):
            for number, at in zip(numbers.tolist(), items.tolist(), strict=True):
                active = self._end_refused(calls, number)
                if active is None:
                    continue
                # The refusal of an extend is the cause of those of the lookups that waited for it.
                if isinstance(calls, ExtendCalls) or (active.key, calls.role) not in faults:
                    faults[active.key, calls.role] = Fault(active, calls.role, Refusal(codes[at]), details[at])
        return list(faults.values())

    def _end_refused(self, calls: Calls, number: int) -> ActiveSession | None:
        """Remove a refused call. Returns the session that waits for it, None if it made hidden drafts."""
        self._calls.end(calls, number)
        if isinstance(calls, ExtendCalls):
            window: VerificationWindow | HiddenDrafts = calls.windows[number]
            window.awaited[calls.role] = None
            if isinstance(window, HiddenDrafts):
                window.active.hidden_drafts = None
                return None
            return window.active
        assert isinstance(calls, Lookups | Widenings)
        row = calls.frame.owners[int(calls.rows[number])]
        assert row is not None
        active: ActiveSession = row.window.active
        return active

    def _take_forked(self, message: Forked) -> None:
        """Count the tokens of prompts that the primary's replica had in its cache."""
        for calls, numbers, items in self._calls.find(message.items["call_id"]):
            tokens = message.items["tokens"][items].tolist()
            for number, count in zip(numbers.tolist(), tokens, strict=True):
                window = calls.windows[number] if isinstance(calls, ExtendCalls) else None
                if isinstance(window, VerificationWindow) and calls.role == window.active.primary:
                    window.active.session.count_cached(count)

    def _take_drafts(self, message: Drafted) -> None:
        drafted = drafted_items(message)
        for calls, numbers, items in self._calls.find(message.items["call_id"]):
            for number, item in zip(numbers.tolist(), items.tolist(), strict=True):
                assert isinstance(calls, ExtendCalls)
                window, tokens = calls.windows[number], drafted[item][1]
                if isinstance(window, HiddenDrafts):
                    window.tokens = tokens
                elif not window.rows:
                    self._draft(window, tokens)

    def _draft(self, window: VerificationWindow, tokens: Sequence[int]) -> None:
        """Verify drafts of the guider, in its ids."""
        drafts = window.active.session.translators["guider"].drafts_in_target(tokens)
        self._request_rows(window, drafts, tokens)


def _extend_columns(first: int, members: Sequence[PendingExtend]) -> ExtendColumns:
    """The items of extends for one replica. first: id of the first call."""
    sessions = [each.window.active for each in members]
    items = np.empty(len(members), EXTEND_ITEM)
    items["call_id"] = np.arange(first, first + len(members))
    items["session"] = [active.key for active in sessions]
    items["age"] = [active.age for active in sessions]
    items["prefix"] = [each.prefix for each in members]
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
        np.concatenate([NO_IDS, *(each.required_ids for each in members)]),
        {place: each.draft for place, each in enumerate(members) if each.draft is not None},
    )
