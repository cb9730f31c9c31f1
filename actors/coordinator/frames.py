"""Frames: the logits rows that were requested together, as columns of one shape, whatever sessions they belong to.

A row leaves its frame for a wider one when its slices do not suffice. Rows of a frame become complete one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from actors.api.generation import Role
from actors.coordinator.states import ROW_TRANSITIONS, RowStage, transition, transition_rows
from actors.decoding.candidates import BlockLayout, CandidateBlock, Ids
from actors.decoding.kernels import ALONE, GUIDED, scan_rows
from actors.decoding.vocabulary import RequiredLogits

Owner = TypeVar("Owner")


@dataclass(frozen=True, slots=True, eq=False)
class FrameShape:
    """The properties that all rows of a frame share.

    required: by role that takes part, the primary first. k: width of slices; WHOLE: whole rows. aligned: small models
    with another vocabulary take part. scores_prompt: the rows score tokens of a prompt, without candidates. all_legal:
    the logits of a grammar's few legal ids are looked up. proposing: the roles whose slices determine the candidates,
    if any.
    """

    required: Mapping[Role, RequiredLogits]
    guided: bool
    aligned: bool
    scores_prompt: bool
    k: int
    all_legal: bool
    proposing: Sequence[Role]
    layout: BlockLayout

    @property
    def primary(self) -> Role:
        """The role in whose ids the rows are decided."""
        return next(iter(self.required))


class RowKeys(NamedTuple):
    """To which session each row [n] belongs, and by which keys the replicas of R roles know it."""

    sessions: NDArray[np.void]  # [n], `kernels.SESSION`
    replicas: Ids  # [R, n], `Replica.number`
    positions: Ids  # [R, n], of the row's own token in each role's stream
    prefixes: NDArray[np.uint64]  # [R, n], running hash up to that token


class CallsForRows(Protocol):
    """Calls of one kind to one role, for rows of a frame."""

    role: Role

    def of_row(self, at: int) -> list[int]: ...


class RowFrame(Generic[Owner]):
    """Rows [n] in flight, with their slices and candidates in `block`.

    owners: by row the object to which it belongs, None if it waits for nothing any more. specs [n]: `kernels.SPEC`
    without alpha. heats [n]: temperatures of the primary's tempered logsumexp, from which its rows are filtered. stage
    [n]: `RowStage`. arrived [n]: bit r is set if role r has sent its slice. lookups [R, n]: those in flight. calls:
    those in flight for rows, lookups and widenings.
    """

    def __init__(
        self,
        owners: Sequence[Owner],
        shape: FrameShape,
        keys: RowKeys,
        stage: RowStage,
    ) -> None:
        count, required = len(owners), shape.required
        self.owners: list[Owner | None] = list(owners)
        self.shape, self.keys = shape, keys
        self.specs = keys.sessions["spec"]
        self.specs["rule"] = GUIDED if shape.guided else ALONE
        self.specs["position"] = keys.positions[0] + 1  # a row decides the token behind the primary's own
        heats = self.specs["temperature"]
        self.heats = np.where(heats > 0, heats, 1.0)
        self.block = CandidateBlock(count, shape.layout)
        self.stage = np.full(count, int(stage), np.uint8)
        self.arrived = np.zeros(count, np.uint8)
        self.lookups = np.zeros((len(required), count), np.int32)
        self.calls: list[CallsForRows] = []  # kept by `inflight.InflightCalls`
        self._bits = {role: 1 << number for number, role in enumerate(required)}
        self._proposing = sum(self._bits[role] for role in shape.proposing)
        self._all = (1 << len(required)) - 1

    def receive(self, role: Role, at: Ids | int) -> None:
        """A role's slices of these rows are stored."""
        self.arrived[at] |= self._bits[role]

    def ask(self, role: Role, at: Ids) -> None:
        """Lookups in a role were sent for these rows, which may occur several times."""
        self._count(role, at, 1)

    def take_answers(self, role: Role, at: Ids) -> None:
        """Lookups in a role for these rows were answered."""
        self._count(role, at, -1)

    def _count(self, role: Role, at: Ids, change: int) -> None:
        lookups = self.lookups[self.block.roles[role]]
        if self.shape.aligned:
            np.add.at(lookups, at, change)
        else:  # each row occurs once
            lookups[at] += change

    def lose(self, role: Role, at: int) -> None:
        """A role computes this row again, so its slice is waited for, and the candidates are not known."""
        self.arrived[at] &= ~self._bits[role] & 0xFF
        self.lookups[:, at] = 0
        self.enter(at, RowStage.EXTENDING)

    def abandon(self, at: int) -> None:
        """The row waits for nothing and never becomes complete, because its window has ended or it is widened."""
        self.owners[at] = None
        if self.stage.item(at) != RowStage.COMPLETE:
            self.lookups[:, at] = self.arrived[at] = 0
            self.stage[at] = int(RowStage.EXTENDING)

    def has(self, role: Role, at: int) -> bool:
        """True if a role's slice of this row has arrived."""
        return bool(self.arrived[at] & self._bits[role])

    def enter(self, at: int, stage: RowStage) -> None:
        """Change the stage of one row. Raises ForbiddenTransition."""
        self.stage[at] = int(transition(ROW_TRANSITIONS, RowStage(self.stage[at]), stage))

    def owners_of(self, at: Ids) -> list[Owner]:
        """The owners of rows that still wait for something."""
        owners = self.owners
        return [owner for owner in [owners[row] for row in at.tolist()] if owner is not None]

    def scan(self) -> tuple[Ids, Ids]:
        """The rows whose candidates can be found now; and those that lack nothing any more, which enter COMPLETE."""
        rows, bits = np.empty((2, len(self.stage)), np.int64), (self._proposing, self._all)
        proposed, complete = scan_rows(self.stage, self.arrived, self.lookups, *bits, *rows)
        if complete:
            transition_rows(self.stage, rows[1, :complete], RowStage.COMPLETE)
        return rows[0, :proposed], rows[1, :complete]

    def merge(self, at: Ids) -> None:
        """Find the candidates of these rows, which then wait for the logits that are missing."""
        transition_rows(self.stage, at, RowStage.LOOKING_UP)
        self.block.merge(at)


def row_numbers(values: Sequence[int]) -> NDArray[np.int64]:
    """Row numbers as an index."""
    return np.array(values, np.int64)
