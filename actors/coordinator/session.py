"""A session while it is decoded: its state, its replicas, the logits rows in flight, and rows that replicas hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from actors.api.generation import Generate, PromptNote, Role
from actors.coordinator.output import EventQueue
from actors.coordinator.replica_pool import Replica
from actors.coordinator.states import ROW_TRANSITIONS, SESSION_TRANSITIONS, RowStage, SessionState, transition
from actors.decoding.candidates import CandidateBlock, RowProposal, RowSlice
from actors.decoding.cross_vocab.logprobs import CrossingRows
from actors.decoding.cross_vocab.retokenizer import KEPT_ROWS
from actors.decoding.decision import Decisions
from actors.decoding.prompt import prompt_notes, spread
from actors.decoding.session import Session
from actors.decoding.speculation import Acceptance, TextIndex
from actors.decoding.vocabulary import RequiredLogits
from actors.text.vocabularies import VocabularyRegistry
from actors.wire.messages import WHOLE


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
        self.replicas: dict[Role, Replica] = {}
        self.window: VerificationWindow | None = None
        # Cache of required ids, keyed by `guided`; used only while no emitted token adds required ids.
        self.required: dict[bool, Mapping[Role, RequiredLogits]] = {}
        self.row_histories: dict[Role, RowHistory] = {}  # of small roles with another vocabulary
        self.call_ids: dict[Role, set[int]] = {}  # calls of the window that are in flight
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
        scoring = self.prompt_scoring is not None
        self.enter(SessionState.SCORING_PROMPT if scoring else SessionState.DECODING)

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
        self.session.streams[role].reseed(replica.welcome.hash_seed)
        self.row_histories.pop(role, None)

    def limit(self, role: Role) -> int:
        """Number of positions that a role's model can compute for one session."""
        return self.replicas[role].welcome.max_position

    def room(self, role: Role) -> int:
        """Number of tokens that a role can read after the session's newest token."""
        return self.limit(role) - len(self.session.streams[role])

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
            role: spread([row.slices[role] for row in window.rows], window.required[role], self._width)
            for role in window.roles
        }
        begin = active.session.scored
        tokens = request.prompts[active.primary][begin : begin + len(window.rows)]
        events = [vocabularies.canonical(active.primary, token) for token in tokens]
        return prompt_notes(rows, request.guidance.alpha, tokens, events, request.prompt_logprobs or 0)

    def _guided(self, active: ActiveSession, row: int) -> bool:
        small = [(role, reads[row]) for role, reads in self._reads.items() if role != active.primary]
        return bool(small) and all(1 <= read <= active.limit(role) for role, read in small)


class LogitsRow:
    """One row of logits of a window, from the request of its slices to its decision."""

    __slots__ = (
        "at",
        "audited",
        "block",
        "crossing",
        "index",
        "k",
        "lookups",
        "proposed",
        "slices",
        "stage",
        "window",
    )

    def __init__(self, window: VerificationWindow, index: int, k: int) -> None:
        self.window, self.index = window, index
        self.stage = RowStage.EXTENDING
        self.k = k  # width of its slices; WHOLE: whole rows
        self.slices: dict[Role, RowSlice] = {}
        self.crossing: dict[Role, CrossingRows] = {}  # of small roles with another vocabulary
        self.proposed: RowSlice | None = None  # of a guider with another vocabulary, in the target's ids
        self.block: CandidateBlock | None = None  # once its candidates are known
        self.at = 0  # its row in the block
        self.lookups = 0  # in flight
        self.audited: Decisions | None = None  # from slices, while whole rows are fetched

    @property
    def candidates_known(self) -> bool:
        """True if the slices that determine the candidates have arrived."""
        if not self.window.guided or self.k == WHOLE:
            return all(role in self.slices for role in self.window.roles)
        guider = self.proposed is not None if self.window.aligned else "guider" in self.slices
        return guider and "target" in self.slices

    @property
    def complete(self) -> bool:
        """True if every slice and every lookup has been answered."""
        return self.stage == RowStage.COMPLETE

    def enter(self, stage: RowStage) -> None:
        """Change the stage. Raises ForbiddenTransition."""
        self.stage = transition(ROW_TRANSITIONS, self.stage, stage)

    def join(self, block: CandidateBlock, at: int) -> None:
        """Become row `at` of a block: the candidates are known."""
        self.enter(RowStage.LOOKING_UP)
        self.block, self.at = block, at

    def lookup_sent(self) -> None:
        """Count a lookup in flight."""
        self.lookups += 1

    def lookup_answered(self) -> None:
        """Count a lookup that was answered or refused."""
        self.lookups -= 1

    def complete_if_answered(self) -> None:
        """Enter COMPLETE if every slice and every lookup has been answered."""
        joined = self.stage == RowStage.LOOKING_UP or (self.window.scores_prompt and not self.complete)
        if joined and not self.lookups and len(self.slices) == len(self.window.roles):
            self.enter(RowStage.COMPLETE)

    def enter_widening(self) -> None:
        """Enter WIDENING, or AUDITING if the slices have decided the row."""
        self.enter(RowStage.WIDENING if self.audited is None else RowStage.AUDITING)

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

    def proposal(self) -> RowProposal:
        """The row's required ids and slices, from which a block is made."""
        slices: Mapping[Role, RowSlice] = self.slices
        if self.window.aligned:  # slices of small models are in other ids; a block takes their event probabilities
            offered: dict[Role, RowSlice] = {"target": slices["target"]}
            slices = offered if self.proposed is None else offered | {"guider": self.proposed}
        return RowProposal(self.window.required, slices)

    def extend_again(self, role: Role) -> None:
        """Wait for a role that computes the row again: drop its slice and the candidates."""
        self.slices.pop(role, None)
        self.enter(RowStage.EXTENDING)
        self._forget_candidates()

    def widen(self, k: int) -> None:
        """Wait for slices of this k (WHOLE: whole rows): drop the candidates."""
        self.k = k
        self.enter_widening()
        self._forget_candidates()

    def _forget_candidates(self) -> None:
        self.block, self.proposed, self.lookups = None, None, 0


@dataclass(slots=True, eq=False)
class VerificationWindow:
    """The rows in flight of a session: that of its newest token, and one for each draft token.

    Row i was computed after the first i drafts. It may be decided if the rows before it chose these drafts.

    Example: the newest token is at position 20, the drafts are [7, 8]. Row 0 (position 20) predicts position 21; row 1
    was computed after token 7 at position 21. If row 0 chooses 7, row 1 is decided next. If row 0 chooses 9, the window
    ends, and the next one begins with token 9 at position 21.
    """

    active: ActiveSession
    guided: bool  # True if the small models take part in its decisions
    required: Mapping[Role, RequiredLogits]  # by role that takes part, the primary first
    drafting_role: Role | None = None  # None: no drafts, or drafts from the session's own text
    wanted: int = 0  # drafts requested from the drafting role
    first: dict[Role, int] = field(default_factory=dict)  # position of the first row's token in each role's stream
    draft_tokens: dict[Role, list[int]] = field(default_factory=dict)  # the drafts in each role's ids
    hashes: dict[Role, list[int]] = field(default_factory=dict)  # up to the first row's token, and after each draft
    reads: dict[Role, Sequence[int]] = field(default_factory=dict)  # drafts that a role read before each row
    oldest: dict[Role, int] = field(default_factory=dict)  # earliest position whose row is needed, by aligned role
    rows: list[LogitsRow] = field(default_factory=list)  # empty while drafts are requested
    next: int = 0  # index of the row to be decided now
    answered: set[Role] = field(default_factory=set)  # roles whose replicas hold all tokens of the window
    scores_prompt: bool = False  # its rows score tokens of the prompt; none is chosen

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

    def settle(self) -> None:
        """End the window: for each role, find how many of the session's tokens its replica holds."""
        for role, hashes in self.hashes.items():
            stream, first = self.active.session.streams[role], self.first[role]
            held = min(stream.held, first)
            if role in self.answered or role == self.drafting_role:
                # The drafting role may not have computed its last token yet.
                certain = len(hashes) - (role not in self.answered)
                for index in range(certain - 1, -1, -1):
                    length = first + index + 1
                    if length <= len(stream) and stream.hash_before(length) == hashes[index]:
                        held = length
                        break
            stream.hold(held)

    def dissolve(self) -> list[LogitsRow]:
        """Empty the window and return its rows; this breaks the reference cycle between rows and window."""
        rows, self.rows = self.rows, []
        return rows


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
