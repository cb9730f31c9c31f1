"""States of a session and stages of a logits row, each with the table of its allowed transitions.

A table has one byte per state: bit n is set if state n may follow. It can be indexed by one state, and
`np.frombuffer(table, np.uint8)[before] >> after & 1` checks whole columns of states at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import TypeVar


class ForbiddenTransition(RuntimeError):
    """A state was to follow one that it must not follow: a fault of this program."""


class SessionState(IntEnum):
    """Where a session stands in its coordinator."""

    QUEUED = 0  # in the admission queue, not admitted yet
    SCORING_PROMPT = 1  # whole rows of its prompt are requested
    DECODING = 2  # the rows of a verification window are requested
    PARKED = 3  # a replica refused its window for lack of cache; it waits for room
    NO_REPLICA = 4  # no replica of a role that it needs is connected
    FINISHED = 5  # its last event was emitted, and its caches are released


class RowStage(IntEnum):
    """What a logits row waits for."""

    EXTENDING = 0  # top-k slices
    LOOKING_UP = 1  # its candidates are known; logits of some are still missing in some roles
    COMPLETE = 2  # nothing: it can be decided
    WIDENING = 3  # slices of a larger k
    AUDITING = 4  # whole rows, with which the decision from slices is compared


State = TypeVar("State", bound=IntEnum)


def _table(allowed: Mapping[State, Sequence[State]]) -> bytes:
    return bytes(sum(1 << after for after in allowed[before]) for before in sorted(allowed))


# A state follows itself where a session begins its next window, or where one more role is waited for.
SESSION_TRANSITIONS = _table(
    {
        SessionState.QUEUED: (
            SessionState.SCORING_PROMPT,
            SessionState.DECODING,
            SessionState.NO_REPLICA,
            SessionState.FINISHED,
        ),
        SessionState.SCORING_PROMPT: (
            SessionState.SCORING_PROMPT,
            SessionState.DECODING,
            SessionState.PARKED,
            SessionState.NO_REPLICA,
            SessionState.FINISHED,
        ),
        SessionState.DECODING: (
            SessionState.DECODING,
            SessionState.PARKED,
            SessionState.NO_REPLICA,
            SessionState.FINISHED,
        ),
        SessionState.PARKED: (
            SessionState.PARKED,
            SessionState.SCORING_PROMPT,
            SessionState.DECODING,
            SessionState.NO_REPLICA,
            SessionState.FINISHED,
        ),
        SessionState.NO_REPLICA: (
            SessionState.NO_REPLICA,
            SessionState.SCORING_PROMPT,
            SessionState.DECODING,
            SessionState.FINISHED,
        ),
        SessionState.FINISHED: (),
    }
)

# Every stage goes back to EXTENDING when a replica lost its part of the row. Rows of a prompt have no candidates.
ROW_TRANSITIONS = _table(
    {
        RowStage.EXTENDING: (
            RowStage.EXTENDING,
            RowStage.LOOKING_UP,
            RowStage.COMPLETE,
            RowStage.WIDENING,
            RowStage.AUDITING,
        ),
        RowStage.LOOKING_UP: (RowStage.COMPLETE, RowStage.EXTENDING),
        RowStage.COMPLETE: (RowStage.WIDENING, RowStage.AUDITING, RowStage.EXTENDING),
        RowStage.WIDENING: (RowStage.WIDENING, RowStage.LOOKING_UP, RowStage.EXTENDING),
        RowStage.AUDITING: (RowStage.AUDITING, RowStage.LOOKING_UP, RowStage.EXTENDING),
    }
)


def transition(table: bytes, before: State, after: State) -> State:
    """Return `after` if it may follow `before`. Raises ForbiddenTransition."""
    if not table[before] >> after & 1:
        raise ForbiddenTransition(f"{before.name} -> {after.name}")
    return after
