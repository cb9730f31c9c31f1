"""A session while it is decoded: its state, its replicas, the logits rows in flight, and rows that replicas hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from actors.api.generation import ROLES, Generate, PromptNote, Role
from actors.coordinator.frames import RowFrame
from actors.coordinator.inflight import ExtendCalls
from actors.coordinator.output import EventQueue
from actors.coordinator.replica_pool import Replica
from actors.coordinator.states import SESSION_TRANSITIONS, RowStage, SessionState, transition
from actors.decoding.candidates import RowSlice
from actors.decoding.cross_vocab.logprobs import CrossingRows, TokenEventLogprobs
from actors.decoding.cross_vocab.retokenizer import KEPT_ROWS
from actors.decoding.decision import Decisions
from actors.decoding.prompt import prompt_notes, spread
from actors.decoding.session import Session
from actors.decoding.speculation import Acceptance, TextIndex
from actors.decoding.vocabulary import RequiredLogits
from actors.text.vocabularies import VocabularyRegistry

Source = Literal["guider", "text", "grammar"]  # of drafts


@dataclass(frozen=True, slots=True)
class CacheWait:
    """A parked session's wait for room in one replica's cache. not_before: seconds on the admission queue's clock."""

    not_before: float
    resume: Callable[[], None]


class ActiveSession:
    """One session, its state, the replicas that it is bound to, and the window of rows in flight."""

    def __init__(
        self,
        session: Session,
        key: int,
        age: int,
        acceptance: Mapping[str, Acceptance],
        prompt_scoring: PromptScoring | None = None,
    ) -> None:
        """age: in nanoseconds; a smaller one is older and goes first. prompt_scoring: if the prompt is to be scored."""
        self.session, self.key, self.age, self.acceptance = session, key, age, acceptance
        self.events = EventQueue()
        self.text = TextIndex()
        self.epoch = 1
        self.slot = -1  # in the session table, while it is admitted
        self.replicas: dict[Role, Replica] = {}
        self._limits: dict[Role, int] = {}
        self.window: VerificationWindow | None = None
        self.hidden_drafts: HiddenDrafts | None = None  # for the window after this one
        self.row_histories: dict[Role, RowHistory] = {}  # of small roles with another vocabulary
        self.state = SessionState.QUEUED
        self.state_since = time.monotonic()
        self.cache_waits: dict[Role, CacheWait] = {}  # while PARKED: by role whose replica has no room
        self.rows_due_since = 0.0  # when the rows in flight were requested
        self.faults = 0  # since the last token: refusals other than FULL and KV_MISS, timeouts, failed turns
        self.misses = 0  # since the last token: refusals for lack of room, and because the cache was gone
        self.prompt_scoring = prompt_scoring  # until the prompt is scored
        self.past_context = False  # a small model's positions are used up: the target goes on alone

    @property
    def primary(self) -> Role:
        """The role whose vocabulary the answer is in."""
        return self.session.request.primary

    @property
    def client(self) -> str:
        """Client of the request; the admission queue is fair between clients."""
        return self.session.request.client

    @property
    def priority(self) -> int:
        """Priority of the request among those of its client; lower is sooner."""
        return self.session.request.priority

    @property
    def resumed(self) -> bool:
        """True if another coordinator began the session and its client has part of the answer."""
        return self.session.request.resumed

    def enter(self, state: SessionState) -> None:
        """Change the state. Raises ForbiddenTransition."""
        before, self.state = self.state, transition(SESSION_TRANSITIONS, self.state, state)
        if before != state:
            self.state_since = time.monotonic()
        if state != SessionState.PARKED:
            self.cache_waits.clear()

    def begin(self) -> None:
        """Enter the state in which rows are requested: of its prompt while that is scored, else of its answer."""
        state = SessionState.DECODING if self.prompt_scoring is None else SessionState.SCORING_PROMPT
        if state != self.state:
            self.enter(state)

    def park(self, role: Role, wait: CacheWait) -> None:
        """Wait for room in the cache of a role's replica."""
        self.enter(SessionState.PARKED)
        self.cache_waits[role] = wait

    def unpark(self, role: Role) -> None:
        """Take back the wait for room in a role's cache."""
        del self.cache_waits[role]
        if not self.cache_waits:
            self.begin()

    def expect_rows(self, after_s: float = 0.0) -> None:
        """Start the deadline of the rows in flight, now or after `after_s` seconds."""
        self.rows_due_since = time.monotonic() + after_s

    def count_fault(self) -> None:
        """Count a failure of a model."""
        self.faults += 1

    def count_miss(self) -> None:
        """Count a refusal for lack of room or for an evicted cache."""
        self.misses += 1

    def reset_faults(self) -> None:
        """Forget earlier faults and misses, because the session went on."""
        self.faults = self.misses = 0

    def end_prompt_scoring(self) -> None:
        """Stop scoring the prompt, because every wanted row has been read."""
        self.prompt_scoring = None

    def stop_guidance(self) -> None:
        """Go on with the target alone, because a small model's positions are used up."""
        self.past_context = True

    def bind(self, role: Role, replica: Replica) -> None:
        """Use this replica for the role. It holds none of the session's tokens yet."""
        self.replicas[role] = replica
        self._limits[role] = replica.welcome.max_position
        self.session.streams[role].reseed(replica.welcome.hash_seed)
        self.row_histories.pop(role, None)

    def limit(self, role: Role) -> int:
        """Number of positions that a role's model can compute for one session."""
        return self._limits[role]

    def room(self, role: Role) -> int:
        """Number of tokens that a role can read after the session's newest token."""
        return self._limits[role] - len(self.session.streams[role].tokens)

    def alpha(self, ahead: int = 0) -> float:
        """Alpha of the next token, or of the token `ahead` places later if thinking does not end before it."""
        return 0.0 if self.past_context else self.session.alpha(ahead)

    @property
    def over(self) -> bool:
        """True if the answer is finished."""
        return self.session.finish_reason is not None


# Most rows and most logits that one chunk requests from a role: they bound memory and the wait of other sessions.
_ROWS, _LOGITS = 32, 1 << 20


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Rows of a prompt that are requested together: `rows` rows from the primary's token `begin` on."""

    begin: int
    rows: int
    guided: bool


class PromptScoring:
    """Plans the chunks in which a prompt is scored, and turns their rows into log-probabilities."""

    def __init__(self, request: Generate, reads: Mapping[Role, Sequence[int]], width: int) -> None:
        """reads: for each token of the primary, how many tokens each role has read after it. width: logits in a row."""
        self._request, self._reads, self._width = request, reads, width

    @property
    def roles(self) -> tuple[Role, ...]:
        """Roles that score the prompt, the primary first."""
        return tuple(self._reads)

    def next(self, active: ActiveSession) -> PromptChunk | None:
        """The next chunk; None at the end of the prompt. The row of a token predicts the token after it.

        A chunk is unguided where a small model has no row: before its first token and past its positions.
        """
        begin = max(active.session.scored - 1, 0)
        most = min(max(1, min(_ROWS, _LOGITS // self._width)), len(self._reads[active.primary]) - 1 - begin)
        if most < 1:
            return None
        guided = self._guided(active, begin)
        return PromptChunk(
            begin, next((n for n in range(1, most) if self._guided(active, begin + n) != guided), most), guided
        )

    def reads(self, chunk: PromptChunk, role: Role) -> Sequence[int]:
        """Number of its tokens that a role has read at each row of a chunk."""
        return self._reads[role][chunk.begin : chunk.begin + chunk.rows]

    def notes(self, window: VerificationWindow, vocabularies: VocabularyRegistry) -> list[PromptNote]:
        """Log-probabilities of the tokens that follow the complete rows of a window."""
        active, request = window.active, self._request
        rows = {
            role: spread([row.frame.block.slice(role, row.at) for row in window.rows], required, self._width)
            for role, required in window.required.items()
        }
        begin = active.session.scored
        tokens = request.prompts[active.primary][begin : begin + len(window.rows)]
        events = [vocabularies.canonical(active.primary, token) for token in tokens]
        return prompt_notes(rows, request.guidance.alpha, tokens, events, request.prompt_logprobs or 0)

    def _guided(self, active: ActiveSession, row: int) -> bool:
        small = [(role, reads[row]) for role, reads in self._reads.items() if role != active.primary]
        return bool(small) and all(1 <= read <= active.limit(role) for role, read in small)


class LogitsRow:
    """One row of logits of a window: row `at` of `frame`, from the request of its slices to its decision."""

    __slots__ = ("at", "audited", "crossing", "events", "frame", "index", "k", "legal_ids", "slices", "window")

    # Of small roles with another vocabulary: slices in their ids, earlier rows, and the candidates' events with the
    # number of this row.
    slices: dict[Role, RowSlice]
    crossing: dict[Role, CrossingRows]
    events: dict[Role, tuple[TokenEventLogprobs, int]]

    def __init__(self, window: VerificationWindow, index: int, k: int) -> None:
        self.window, self.index = window, index
        self.k = k  # width of its slices; WHOLE: whole rows
        self.legal_ids: Sequence[int] = ()  # ids that a grammar allows, all of which are candidates then
        self.frame: RowFrame[LogitsRow]
        self.at = -1  # until it has a frame
        self.audited: Decisions | None = None  # from slices, while whole rows are fetched
        if window.oldest:
            self.slices, self.crossing, self.events = {}, {}, {}
        else:
            self.slices, self.crossing, self.events = _NO_SLICES, _NO_CROSSING, _NO_EVENTS

    @property
    def complete(self) -> bool:
        """True if every slice and every lookup has been answered."""
        return self.at >= 0 and self.frame.stage.item(self.at) == RowStage.COMPLETE

    def place(self, frame: RowFrame[LogitsRow], at: int) -> None:
        """Become row `at` of a frame."""
        self.frame, self.at = frame, at

    def lose(self, role: Role) -> None:
        """Wait for a role that computes the row again: drop its slice and the candidates."""
        self.slices.pop(role, None)
        self.frame.lose(role, self.at)

    def widen(self, k: int) -> None:
        """Wait for slices of this k (WHOLE: whole rows)."""
        self.k, self.legal_ids = k, ()
        self.frame.enter(self.at, RowStage.WIDENING if self.audited is None else RowStage.AUDITING)

    def complete_with(self, ids: Sequence[int]) -> None:
        """Wait for the logits of the ids that a grammar allows, all of them."""
        self.legal_ids = ids
        self.frame.enter(self.at, RowStage.WIDENING)

    def begin_audit(self, decisions: Decisions) -> None:
        """Keep what the slices decided until whole rows have been fetched."""
        self.audited = decisions

    def end_audit(self) -> Decisions:
        """Return what the slices decided."""
        decisions, self.audited = self.audited, None
        assert decisions is not None
        return decisions

    def key(self, role: Role) -> tuple[int, int]:
        """Key of the row at a replica: the position of its token, and the running hash up to it."""
        return self.window.key(role, self.position(role))

    def position(self, role: Role) -> int:
        """Position of the row's token in a role's stream."""
        return self.window.first[role] + self.window.reads[role][self.index]


_NO_SLICES: dict[Role, RowSlice] = {}
_NO_CROSSING: dict[Role, CrossingRows] = {}
_NO_EVENTS: dict[Role, tuple[TokenEventLogprobs, int]] = {}
_NO_DRAFT_TOKENS: Mapping[Role, Sequence[int]] = dict.fromkeys(ROLES, ())
_ONE_ROW: Mapping[Role, Sequence[int]] = dict.fromkeys(ROLES, (0,))
_NO_OLDEST: Mapping[Role, int] = {}


class VerificationWindow:
    """The rows in flight of a session: that of its newest token, and one for each draft token.

    Row i was computed after the first i drafts. It may be decided if the rows before it chose these drafts.

    Example: the newest token is at position 20, the drafts are [7, 8]. Row 0 (position 20) predicts position 21; row 1
    was computed after token 7 at position 21. If row 0 chooses 7, row 1 is decided next. If row 0 chooses 9, the window
    ends, and the next one begins with token 9 at position 21.
    """

    __slots__ = (
        "active",
        "awaited",
        "draft_tokens",
        "drafting_role",
        "first",
        "guided",
        "hashes",
        "hidden",
        "next",
        "oldest",
        "reads",
        "required",
        "rows",
        "scores_prompt",
        "source",
        "to_hide",
        "wanted",
    )

    def __init__(
        self,
        active: ActiveSession,
        guided: bool,
        required: Mapping[Role, RequiredLogits],
        drafting_role: Role | None = None,
        wanted: int = 0,
        scores_prompt: bool = False,
        to_hide: int = 0,
        source: Source = "text",
    ) -> None:
        """wanted: drafts requested from the drafting role. to_hide: drafts that it makes behind them meanwhile.

        source: of the drafts, if it is no role.
        """
        self.active = active
        self.guided = guided  # True if the small models take part in its decisions
        self.required = required  # by role that takes part, the primary first
        self.drafting_role = drafting_role  # None: no drafts, or drafts of another source
        self.source: Source = "guider" if drafting_role == "guider" else source
        self.wanted, self.to_hide = wanted, to_hide
        self.hidden = False  # True if its drafts were made while the window before it was verified
        self.scores_prompt = scores_prompt  # its rows score tokens of the prompt; none is chosen
        self.first: dict[Role, int] = {}  # position of the first row's token in each role's stream
        self.draft_tokens: Mapping[Role, Sequence[int]] = _NO_DRAFT_TOKENS  # the drafts in each role's ids
        self.hashes: dict[Role, Sequence[int]] = {}  # up to the first row's token, and after each draft
        self.reads: Mapping[Role, Sequence[int]] = _ONE_ROW  # drafts that a role read before each row
        self.oldest: Mapping[Role, int] = _NO_OLDEST  # earliest position whose row is needed, by aligned role
        self.rows: list[LogitsRow] = []  # empty while drafts are requested
        self.next = 0  # index of the row to be decided now
        # By role whose replica does not hold all tokens of the window: the extend in flight, None before it is sent.
        self.awaited: dict[Role, tuple[ExtendCalls[VerificationWindow], int] | None] = dict.fromkeys(required)
        if drafting_role is not None:
            self.awaited[drafting_role] = None

    @property
    def current(self) -> bool:
        """True while the session waits for this window."""
        return self.active.window is self

    @property
    def aligned(self) -> bool:
        """True if small models with another vocabulary take part."""
        return bool(self.oldest)

    def key(self, role: Role, position: int) -> tuple[int, int]:
        """Key of a row at a replica: the position of its token, and the running hash up to it."""
        after = position - self.first[role]
        stream = self.active.session.streams[role]
        return position, stream.hash_before(position + 1) if after < 0 else self.hashes[role][after]

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles whose rows are needed."""
        return tuple(self.required)

    @property
    def drafts(self) -> int:
        """Number of drafts that are verified."""
        return max(0, len(self.rows) - 1)

    def equals_draft(self, row: LogitsRow, token: int) -> bool:
        """True if `token` equals the draft behind this row."""
        drafts = self.draft_tokens[self.active.primary]
        return row.index < len(drafts) and drafts[row.index] == token

    def owing(self) -> set[Role]:
        """The roles that owe an answer: to an extend, or to a call for a row."""
        roles = {role for role, call in self.awaited.items() if call is not None}
        placed = [row for row in self.rows[self.next :] if row.at >= 0]
        calls = [(calls, row.at) for row in placed for calls in row.frame.calls]
        return roles | {each.role for each, at in calls if each.of_row(at)}

    def advance(self) -> None:
        """Go on to the next row: the one before has become a token."""
        self.next += 1

    def ready(self) -> bool:
        """True if the row to be decided now is complete."""
        return self.next < len(self.rows) and self.rows[self.next].complete

    def goes_on(self) -> bool:
        """True if the next row was computed after exactly the session's tokens, and guidance is on or off as before."""
        session = self.active.session
        if self.next >= len(self.rows) or bool(self.active.alpha()) != self.guided:
            return False
        for role in self.required:
            stream, read = session.streams[role], self.reads[role][self.next]
            length = self.first[role] + read + 1
            if len(stream) != length or stream.hash_before(length) != self.hashes[role][read]:
                return False
        return True

    def take_answer(self, role: Role) -> None:
        """A role has answered its extend: its replica holds all tokens of the window."""
        self.awaited.pop(role, None)
        if len(self.hashes[role]) == 1:  # without drafts, which may be rejected: see `settle`
            self.active.session.streams[role].hold(self.first[role] + 1)

    def settle(self) -> None:
        """End a window with drafts: for each role, find how many of the session's tokens its replica holds."""
        streams = self.active.session.streams
        for role, hashes in self.hashes.items():
            stream, first, answered = streams[role], self.first[role], role not in self.awaited
            if len(hashes) == 1 and role != self.drafting_role:
                continue
            held = min(stream.held, first)
            if answered or role == self.drafting_role:
                # The drafting role may not have computed its last token yet.
                for index in range(len(hashes) - 1 - (not answered), -1, -1):
                    length = first + index + 1
                    if length <= len(stream) and stream.hash_before(length) == hashes[index]:
                        held = length
                        break
            stream.hold(held)

    def dissolve(self) -> None:
        """Drop the rows, which breaks the reference cycle between them and the window."""
        rows, self.rows, self.awaited = self.rows, [], {}
        for row in rows:
            if row.at >= 0:
                row.frame.abandon(row.at)


class HiddenDrafts:
    """Drafts that the guider makes while a window is verified, as if its drafts and `token` after them were accepted.

    Example: the window's drafts are [7, 8], and the guider's own choice after them is 9. While the other roles verify
    7 and 8, the guider reads 9 and drafts [4, 5] behind it. If 7, 8 and 9 are chosen, the next window begins with the
    drafts [4, 5]. Otherwise they are forgotten, and what the guider reads next replaces them in its cache.
    """

    __slots__ = ("active", "awaited", "first", "prefix", "replica", "rows", "tokens", "wanted")

    def __init__(self, active: ActiveSession, first: int, prefix: int, wanted: int) -> None:
        """first: position of the token in the guider's stream. prefix: running hash up to it."""
        self.active, self.first, self.prefix, self.wanted = active, first, prefix, wanted
        self.replica = active.replicas["guider"]
        self.awaited: dict[Role, tuple[Any, int] | None] = {"guider": None}
        self.tokens: Sequence[int] | None = None  # the drafts, once they have arrived
        self.rows: Any = None  # their rows, once they have arrived

    @property
    def current(self) -> bool:
        """True until the next window begins."""
        return self.active.hidden_drafts is self

    def fit(self) -> bool:
        """True if they were requested, the session's tokens are those that were assumed, and its guider is the same."""
        if self.rows is None and self.awaited["guider"] is None:
            return False  # the window before ended in the turn in which they were planned
        stream = self.active.session.streams["guider"]
        same = self.active.replicas.get("guider") is self.replica
        return same and len(stream) == self.first + 1 and stream.hash_before(len(stream)) == self.prefix


_KEPT_AT_LEAST = 64  # rows that are kept at least, whatever the replica holds

KeyOf = Callable[[int], tuple[int, int]]  # position -> key of the row: the position, and the running hash up to it


class RowHistory:
    """Slices of consecutive rows of one role. A row is valid while its hash is that of the session's tokens.

    A hash covers all tokens up to the row's own, so the rows before a valid row are valid too.
    """

    __slots__ = ("_first", "_rows")

    def __init__(self) -> None:
        self._first = 0  # position of the first row
        self._rows: list[tuple[int, RowSlice]] = []

    def add(self, key: tuple[int, int], part: RowSlice) -> None:
        """Store a row. Rows behind it are dropped: the replica no longer holds them."""
        position, prefix = key
        at = position - self._first
        if not 0 <= at <= len(self._rows):
            self._first, at = position, 0
        self._rows[at:] = [(prefix, part)]
        if len(self._rows) > 2 * _KEPT_AT_LEAST:
            del self._rows[:-_KEPT_AT_LEAST]
            self._first = position + 1 - _KEPT_AT_LEAST

    def get(self, key: tuple[int, int]) -> RowSlice | None:
        """Slice of a row; None if it is not held."""
        at = key[0] - self._first
        if not 0 <= at < len(self._rows):
            return None
        prefix, part = self._rows[at]
        return part if prefix == key[1] else None

    def reach(self, oldest: int, end: int, key_of: KeyOf) -> int:
        """First position from `oldest` up to `end` whose row is not held."""
        if oldest < self._first:
            return oldest
        position = min(end, self._first + len(self._rows))
        while position > oldest and self.get(key_of(position - 1)) is None:
            position -= 1
        return max(position, oldest)

    def kept(self, position: int, key_of: KeyOf) -> int:
        """Number of rows directly before a position that are held and should be kept."""
        if position <= self._first or self.get(key_of(position - 1)) is None:
            return 0
        return min(KEPT_ROWS, position - self._first)
