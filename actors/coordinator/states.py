"""States of a session and stages of a logits row, each with the table of its allowed transitions.

A table has one byte per state: bit n is set if state n may follow. It can be indexed by one state, and
`np.frombuffer(table, np.uint8)[before] >> after & 1` checks whole columns of states at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray


class ForbiddenTransition(RuntimeError):
    """A state was to follow one that it must not follow: a fault of this program."""


class SessionState(IntEnum):
    """State of a session in its coordinator."""

    QUEUED = 0  # in the admission queue, not admitted yet
    SCORING_PROMPT = 1  # whole rows of its prompt are requested
    DECODING = 2  # the rows of a verification window are requested
    PARKED = 3  # a replica refused its window for lack of cache; it waits for room
    NO_REPLICA = 4  # no replica of a role that it needs is connected
    FINISHED = 5  # its last event was emitted, and its caches are released


class RowStage(IntEnum):
    """Stage of a logits row: the input that it still lacks."""

    EXTENDING = 0  # top-k slices
    LOOKING_UP = 1  # its candidates are known; logits of some are still missing in some roles
    COMPLETE = 2  # nothing: it can be decided
    WIDENING = 3  # slices of a larger k
    AUDITING = 4  # whole rows, with which the decision from slices is compared


State = TypeVar("State", bound=IntEnum)


def _table(allowed: Mapping[State, Sequence[State]]) -> bytes:
    return bytes(sum(1 << after for after in allowed[before]) for before in sorted(allowed))


_S, _R = SessionState, RowStage
# A state follows itself where one more role is waited for.
SESSION_TRANSITIONS = _table(
    {
        _S.QUEUED: (_S.SCORING_PROMPT, _S.DECODING, _S.NO_REPLICA, _S.FINISHED),
        _S.SCORING_PROMPT: (_S.DECODING, _S.PARKED, _S.NO_REPLICA, _S.FINISHED),
        _S.DECODING: (_S.PARKED, _S.NO_REPLICA, _S.FINISHED),
        _S.PARKED: (_S.PARKED, _S.SCORING_PROMPT, _S.DECODING, _S.NO_REPLICA, _S.FINISHED),
        _S.NO_REPLICA: (_S.NO_REPLICA, _S.SCORING_PROMPT, _S.DECODING, _S.FINISHED),
        _S.FINISHED: (),
    }
)
# Every stage goes back to EXTENDING when a replica lost its part of the row. Rows of a prompt have no candidates.
ROW_TRANSITIONS = _table(
    {
        _R.EXTENDING: (_R.EXTENDING, _R.LOOKING_UP, _R.COMPLETE, _R.WIDENING, _R.AUDITING),
        _R.LOOKING_UP: (_R.COMPLETE, _R.EXTENDING),
        _R.COMPLETE: (_R.WIDENING, _R.AUDITING, _R.EXTENDING),
        _R.WIDENING: (_R.WIDENING, _R.LOOKING_UP, _R.EXTENDING),
        _R.AUDITING: (_R.AUDITING, _R.LOOKING_UP, _R.EXTENDING),
    }
)


def transition(table: bytes, before: State, after: State) -> State:
    """Return `after` if it may follow `before`. Raises ForbiddenTransition."""
    if not table[before] >> after & 1:
        raise ForbiddenTransition(f"{before.name} -> {after.name}")
    return after


def transition_rows(stages: NDArray[np.uint8], at: NDArray[np.int64], after: RowStage) -> None:
    """Enter `after` with the rows `at` of a column of stages. Raises ForbiddenTransition, and changes nothing then."""
    allowed = _ROW_ALLOWED[int(after)][stages[at]]
    if not allowed.all():
        before = RowStage(stages[at[np.flatnonzero(~allowed)[0]]])
        raise ForbiddenTransition(f"{before.name} -> {after.name}")
    stages[at] = int(after)


# By stage that is entered, and stage before: True if it may be.
_ROW_ALLOWED = np.frombuffer(ROW_TRANSITIONS, np.uint8) >> np.arange(len(RowStage))[:, None] & 1 == 1
