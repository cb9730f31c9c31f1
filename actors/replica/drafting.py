"""Extends that go on by drafting: one token a forward, each drawn from the row of the one before it."""

from __future__ import annotations

from functools import lru_cache

from actors.api.sampling_params import Sampling
from actors.engine.errors import EngineError
from actors.engine.interface import Engine
from actors.replica.answers import Drawn
from actors.replica.scheduler import Part, Pending
from actors.wire.columns import Draft
from actors.wire.replies import Answer, Replies

MAX_DRAFTS = 8


class Drafter:
    """Carries drafts on, and answers them: `Drafted` when the last token is drawn, `Rows` when its row is there.

    max_position: tokens of one session, beyond which no draft goes.
    """

    def __init__(self, engine: Engine, replies: Replies, max_position: int) -> None:
        self._engine, self._replies, self._max_position = engine, replies, max_position

    def goes_on(self, pending: Pending, tokens: int, drawn: Drawn, *, alone: bool) -> bool:
        """Take in the row of the last `tokens` tokens; whether the token drawn from it is the next to compute.

        Not so where the model cannot take it, and not when the session has been asked for something newer.
        """
        pending.answers.append(drawn.answer)
        pending.advance(tokens)
        if not alone or pending.end >= self._max_position:
            return False
        pending.drafted.append(drawn.token)
        try:
            self._engine.check_extend(Part(pending, 1).extend())
        except EngineError:
            pending.drafted.pop()
            return False
        if not pending.draws:
            self._tell(pending)
        return True

    def finish(self, pending: Pending) -> None:
        """Answer with the drafts that were computed."""
        self._tell(pending)
        self._replies.rows(pending.peer, pending.item.ticket, pending.answers)

    def complete(self, pending: Pending, last: Answer) -> None:
        """The row of the last draft is there: answer with all."""
        pending.answers.append(last)
        self._replies.rows(pending.peer, pending.item.ticket, pending.answers)

    def ends_early(self, pending: Pending) -> bool:
        """Answer without a draft that the cache did not take; False if that is not possible any more, or yet."""
        if not pending.is_drafting or not pending.draws:
            return False
        pending.drafted.pop()
        self.finish(pending)
        return True

    def _tell(self, pending: Pending) -> None:
        self._replies.drafted(pending.peer, pending.item.ticket, pending.drafted)


def wrong_draft(rows: int, draft: Draft) -> str | None:
    """What makes a draft one that can never be made."""
    if rows != 1:
        return f"drafts go on from one row, not {rows}"
    if not 1 <= draft.drafts <= MAX_DRAFTS:
        return f"{draft.drafts} drafts, 1 to {MAX_DRAFTS} can be asked for"
    if draft.position < 0:
        return f"position {draft.position} of a draft is negative"
    try:
        sampling_of(draft)
    except ValueError as error:
        return str(error)
    return None


def sampling_of(draft: Draft) -> Sampling:
    """How a draft is drawn. Raises ValueError."""
    return _sampling(draft.temperature, draft.top_p)


@lru_cache(256)
def _sampling(temperature: float, top_p: float) -> Sampling:
    return Sampling(temperature=temperature, top_p=top_p)
