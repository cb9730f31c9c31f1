"""The rows of one session that are in flight together: that of its newest token, and those of the drafts behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from actors.api.generation import Role
from actors.coordinator.session import Live
from actors.decoding.candidates import Block, Floats, Proposal, Slice
from actors.decoding.cross_vocab.logprobs import Straddled
from actors.decoding.decision import Decisions
from actors.decoding.vocabulary import Known
from actors.wire.messages import WHOLE


@dataclass(slots=True, eq=False)
class Early:
    """What was asked of the target about several rows before it answered, by the guider's slices.

    asked [B, k]: which ids. values [B, k]: NaN where the answer is on its way.
    """

    asked: NDArray[np.bool_]
    values: Floats


class Row:
    """One row of a window on its way to a token."""

    __slots__ = (
        "at",
        "audited",
        "block",
        "early",
        "early_at",
        "index",
        "k",
        "proposed",
        "slices",
        "straddled",
        "waiting",
        "window",
    )

    def __init__(self, window: Window, index: int, k: int) -> None:
        self.window, self.index = window, index
        self.k = k  # width of its slices; WHOLE: whole rows
        self.slices: dict[Role, Slice] = {}
        self.straddled: dict[Role, Straddled] = {}  # by small role of another family, where earlier rows have a say
        self.proposed: Slice | None = None  # what a guider of another family puts forward, in the target's ids
        self.early: Early | None = None
        self.early_at = 0
        self.block: Block | None = None  # once its candidates are known
        self.at = 0  # which row of the block it is
        self.waiting = 0  # lookups on their way
        self.audited: Decisions | None = None  # what the slices decided, while whole rows are fetched to check it

    @property
    def joinable(self) -> bool:
        """Whether all that put candidates forward have answered."""
        if not self.window.guided or self.k == WHOLE:
            return all(role in self.slices for role in self.window.roles)
        guider = self.proposed is not None if self.window.aligned else "guider" in self.slices
        return guider and "target" in self.slices

    @property
    def complete(self) -> bool:
        """Whether all that was asked has come."""
        known = self.block is not None or self.window.reads_prompt
        return known and not self.waiting and len(self.slices) == len(self.window.roles)

    def name(self, role: Role) -> tuple[int, int]:
        """What names it to a replica: the position of its token, and the running hash up to it."""
        return self.window.name(role, self.position(role))

    def position(self, role: Role) -> int:
        """Of its token in a role's stream."""
        return self.window.first[role] + self.window.reads[role][self.index]

    def proposal(self) -> Proposal:
        """What is known of it, for a block."""
        slices: Mapping[Role, Slice] = self.slices
        if self.window.aligned:  # small models speak through their events
            offered: dict[Role, Slice] = {"target": slices["target"]}
            slices = offered if self.proposed is None else offered | {"guider": self.proposed}
        if self.early is None:
            return Proposal(self.window.known, slices)
        values, asked = self.early.values[self.early_at], self.early.asked[self.early_at]
        return Proposal(self.window.known, slices, values, asked)

    def restart(self) -> None:
        """Forget its candidates: a role answers anew."""
        self.block, self.early, self.proposed, self.waiting = None, None, None, 0


@dataclass(slots=True, eq=False)
class Window:
    """Rows in flight. Row i may be decided when the rows before it came to the drafts that it was computed after."""

    live: Live
    guided: bool  # whether the small models take part in its decisions
    known: Mapping[Role, Known]  # what every row must know, by each role that takes part; the primary first
    drafter: Role | None = None  # who drafts; None: nobody, or the session's own text
    wanted: int = 0  # drafts asked of the drafter
    first: dict[Role, int] = field(default_factory=dict)  # position of the first row's token in each role's stream
    tails: dict[Role, list[int]] = field(default_factory=dict)  # the drafts in each role's ids
    hashes: dict[Role, list[int]] = field(default_factory=dict)  # up to the first row's token, and after each draft
    reads: dict[Role, Sequence[int]] = field(default_factory=dict)  # how many of its drafts a role read before each row
    oldest: dict[Role, int] = field(default_factory=dict)  # the earliest position whose row is needed, of aligned roles
    rows: list[Row] = field(default_factory=list)  # empty while the drafter drafts
    next: int = 0  # the row to be decided now
    answered: set[Role] = field(default_factory=set)  # roles whose replicas hold all tokens of the window
    reads_prompt: bool = False  # its whole rows say what follows in the prompt: nothing is chosen

    @property
    def aligned(self) -> bool:
        """Whether small models of another family take part."""
        return bool(self.oldest)

    def name(self, role: Role, position: int) -> tuple[int, int]:
        """What names a row to a replica: the position of its token, and the running hash up to it."""
        after = position - self.first[role]
        stream = self.live.session.streams[role]
        return position, stream.hash_before(position + 1) if after < 0 else self.hashes[role][after]

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles whose rows are needed."""
        return tuple(self.known)

    @property
    def drafts(self) -> int:
        """How many drafts are checked."""
        return max(0, len(self.rows) - 1)

    def drafted(self, row: Row, token: int) -> bool:
        """Whether the token of a row is the draft behind it."""
        drafts = self.tails[self.live.primary]
        return row.index < len(drafts) and drafts[row.index] == token

    def ready(self) -> bool:
        """Whether the row to be decided now is complete."""
        return self.next < len(self.rows) and self.rows[self.next].complete

    def goes_on(self) -> bool:
        """Whether the session's tokens are those that the next row was computed after, and it is guided as before."""
        session = self.live.session
        if self.next >= len(self.rows) or bool(self.live.alpha()) != self.guided:
            return False
        for role in self.known:
            stream, read = session.streams[role], self.reads[role][self.next]
            length = self.first[role] + read + 1
            if len(stream) != length or stream.hash_before(length) != self.hashes[role][read]:
                return False
        return True

    def settle(self) -> None:
        """The window is over: note how far what each replica holds is what the session came to."""
        for role, hashes in self.hashes.items():
            stream, first = self.live.session.streams[role], self.first[role]
            held = min(stream.held, first)
            if role in self.answered or role == self.drafter:
                # The drafter's last token may still be on its way into its cache.
                certain = len(hashes) - (role not in self.answered)
                for index in range(certain - 1, -1, -1):
                    length = first + index + 1
                    if length <= len(stream) and stream.hash_before(length) == hashes[index]:
                        held = length
                        break
            stream.held = held

    def dissolve(self) -> list[Row]:
        """Its rows, which it has no longer: each knows its window, so both would wait for the garbage collector."""
        rows, self.rows = self.rows, []
        return rows
