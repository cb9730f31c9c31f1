"""Frames: the logits rows that were requested together, as columns of one shape, whatever sessions they belong to.

A row leaves its frame for a wider one when its slices do not suffice. Rows of a frame become complete one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from actors.api.generation import Role
from actors.coordinator.states import ROW_TRANSITIONS, RowStage, transition, transition_rows
from actors.decoding.candidates import CandidateBlock, Ids
from actors.decoding.vocabulary import RequiredLogits

Owner = TypeVar("Owner")


@dataclass(frozen=True, slots=True)
class FrameShape:
    """The properties that all rows of a frame share.

    required: by role that takes part, the primary first. k: width of slices; WHOLE: whole rows. aligned: small models
    with another vocabulary take part. scores_prompt: the rows score tokens of a prompt, without candidates.
    """

    required: Mapping[Role, RequiredLogits]
    guided: bool
    aligned: bool
    scores_prompt: bool
    k: int

    @property
    def primary(self) -> Role:
        """The role in whose ids the rows are decided."""
        return next(iter(self.required))

    @property
    def key(self) -> tuple[object, ...]:
        """Key by which rows are grouped. Required logits are compared by identity: sessions share them."""
        required = tuple((role, id(needed)) for role, needed in self.required.items())
        return self.guided, self.aligned, self.scores_prompt, self.k, required


class RowFrame(Generic[Owner]):
    """Rows [n] in flight, with their slices and candidates in `block`.

    owners: by row the object to which it belongs, None if it waits for nothing any more. stage [n]: `RowStage`. arrived
    [n]: bit r is set if role r has sent its slice. lookups [n]: those in flight.
    """

    def __init__(
        self,
        owners: Sequence[Owner],
        shape: FrameShape,
        widths: Mapping[Role, int],
        proposing: Sequence[Role],
        stage: RowStage,
    ) -> None:
        """widths: most ids in a role's slice. proposing: the roles whose slices determine the candidates, if any."""
        count, required = len(owners), shape.required
        self.owners: list[Owner | None] = list(owners)
        self.shape = shape
        self.block = CandidateBlock(count, required, widths)
        self.stage = np.full(count, stage, np.uint8)
        self.arrived = np.zeros(count, np.uint8)
        self.lookups = np.zeros(count, np.int32)
        self._bits = {role: 1 << number for number, role in enumerate(required)}
        self._proposing = sum(self._bits[role] for role in proposing)
        self._all = (1 << len(required)) - 1

    def receive(self, role: Role, at: Ids | int) -> None:
        """A role's slices of these rows are stored."""
        self.arrived[at] |= self._bits[role]

    def lose(self, role: Role, at: int) -> None:
        """A role computes this row again, so its slice is waited for, and the candidates are not known."""
        self.arrived[at] &= ~self._bits[role] & 0xFF
        self.lookups[at] = 0
        self.enter(at, RowStage.EXTENDING)

    def abandon(self, at: int) -> None:
        """The row waits for nothing and never becomes complete, because its window has ended or it is widened."""
        self.owners[at] = None
        self.arrived[at] = self.lookups[at] = 0
        self.stage[at] = RowStage.EXTENDING

    def has(self, role: Role, at: int) -> bool:
        """True if a role's slice of this row has arrived."""
        return bool(self.arrived[at] & self._bits[role])

    def enter(self, at: int, stage: RowStage) -> None:
        """Change the stage of one row. Raises ForbiddenTransition."""
        self.stage[at] = transition(ROW_TRANSITIONS, RowStage(self.stage[at]), stage)

    def owners_of(self, at: Ids) -> list[Owner]:
        """The owners of rows that still wait for something."""
        return [owner for owner in (self.owners[row] for row in at.tolist()) if owner is not None]

    def proposed(self) -> Ids:
        """The rows whose candidates can be found now."""
        if not self._proposing:
            return np.zeros(0, np.int64)
        waiting = (self.stage != RowStage.LOOKING_UP) & (self.stage != RowStage.COMPLETE)
        return np.flatnonzero(waiting & (self.arrived & self._proposing == self._proposing))

    def merge(self, at: Ids) -> None:
        """Find the candidates of these rows, which then wait for the logits that are missing."""
        transition_rows(self.stage, at, RowStage.LOOKING_UP)
        self.block.merge(at)

    def complete(self) -> Ids:
        """Enter COMPLETE with every row that has all slices and lookups, and return these rows."""
        before = RowStage.LOOKING_UP if self._proposing else RowStage.EXTENDING
        ready = np.flatnonzero((self.stage == before) & (self.lookups == 0) & (self.arrived == self._all))
        if len(ready):
            transition_rows(self.stage, ready, RowStage.COMPLETE)
        return ready


def row_numbers(values: Sequence[int]) -> NDArray[np.int64]:
    """Row numbers as an index."""
    return np.array(values, np.int64)
