"""Reduces the logits of a forward to the rows that coordinators requested, and samples drafted tokens from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import repeat
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from actors.api.sampling_params import Sampling
from actors.decoding.decision import choose as choose_tokens
from actors.engine.errors import EngineError
from actors.engine.interface import Engine
from actors.replica.scheduler import Chunk, ScheduledExtend
from actors.wire.columns import Draft, ExtendItem
from actors.wire.messages import ROWS_ITEM, WHOLE
from actors.wire.replies import AnsweredItems, Reduced, Replies

DRAFT_WIDTH = 64  # width of the slice that a draft is sampled from, if the answer has no slice
_NO_VALUES = np.zeros(0, np.float32)
_NO_ROWS = Reduced(_NO_VALUES, _NO_VALUES, np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32), _NO_VALUES)


class Answer(NamedTuple):
    """The rows of one extend, which were reduced together with those of others, and the token sampled from its row."""

    answered: AnsweredItems
    place: int  # among the items
    token: int | None = None  # None: the extend drafts no further token


def answer_all(engine: Engine, done: Sequence[ScheduledExtend]) -> list[Answer]:
    """The answers to extends whose rows were just computed, in their order. Rows of equal k are reduced together."""
    groups: dict[tuple[int, bool, bool], list[int]] = {}
    for place, scheduled in enumerate(done):
        item = scheduled.item
        groups.setdefault((width_of(item.k, engine.width), scheduled.draws, item.rows > 0), []).append(place)
    answers: dict[int, Answer] = {}
    for (k, draws, _), places in groups.items():
        answers.update(zip(places, _answer(engine, k, draws, [done[place] for place in places]), strict=True))
    return [answers[place] for place in range(len(done))]


def _answer(engine: Engine, k: int, draws: bool, group: Sequence[ScheduledExtend]) -> Iterator[Answer]:
    """The answers to extends of one k, which all request rows or all request none."""
    requested = [scheduled.item for scheduled in group]
    items = np.array(
        [(item.call_id, item.rows, k, len(item.required_ids) if item.rows else 0) for item in requested], ROWS_ITEM
    )
    if not requested[0].rows:
        return map(Answer, repeat(AnsweredItems(items, [_NO_ROWS])), range(len(group)))
    sessions = [item.session for item in requested]
    temperatures = [item.temperature for item in requested for _ in range(item.rows)]
    wide = min(DRAFT_WIDTH, engine.width) if draws and k <= 0 else max(k, 0)
    slices = engine.reduce(sessions, wide, temperatures)
    ids, logits = (slices.ids, slices.logits) if wide == k else (slices.ids[:, :0], slices.logits[:, :0])
    whole = engine.whole(sessions) if k == WHOLE else logits
    reduced = Reduced(slices.logsumexp, slices.tempered, ids, whole, _required(engine, requested))
    tokens = _draw(slices.ids, slices.logits, group) if draws else repeat(None)
    return map(Answer, repeat(AnsweredItems(items, [reduced])), range(len(group)), tokens)


def _draw(ids: NDArray[np.int32], logits: NDArray[np.float32], group: Sequence[ScheduledExtend]) -> list[int]:
    """The next drafted token of each extend, from its row of the slices `ids` and `logits` [B, k]."""
    parameters, seeds, positions = [], [], []
    for scheduled in group:
        draft = scheduled.item.draft
        assert draft is not None
        parameters.append(sampling_of(draft))
        seeds.append(draft.seed)
        positions.append(draft.position + len(scheduled.drafted))
    tokens: list[int] = choose_tokens(ids, logits.astype(np.float64), parameters, seeds, positions).tolist()
    return tokens


def _required(engine: Engine, items: Sequence[ExtendItem]) -> NDArray[np.float32]:
    """The logits of all rows at their items' required ids, flat: item after item, row after row."""
    rows, counts, ids = [], [], []
    for item in items:
        if len(item.required_ids):
            held = engine.rows(item.session)
            assert held is not None, "rows are held until the session's next extend"
            for row in range(held.size - item.rows, held.size):
                rows.append((held, row))
                counts.append(len(item.required_ids))
                ids.append(item.required_ids)
    return engine.values(rows, counts, np.concatenate(ids)) if rows else _NO_VALUES


def width_of(k: int, width: int) -> int:
    """The k of an answer: the requested one, but at most the row's width; WHOLE stays WHOLE."""
    return k if k == WHOLE else min(k, width)


def ids_in_range(ids: NDArray[np.int32], width: int) -> bool:
    """True if all of `ids` are in [0, width)."""
    return not len(ids) or bool(ids.view(np.uint32).max() < width)  # a negative id is a large unsigned one


class Drafter:
    """Continues extends that draft. Sends `Drafted` when the last token is sampled, `Rows` when its row is computed.

    Example, an extend of tokens 5 to 8 with 2 drafts; each line is one forward:
        computes 5 to 8    row 8 gives draft 9
        computes 9         row 9 gives draft 10; `Drafted` has both
        computes 10        `Rows` has rows 8, 9 and 10

    max_position: tokens of one session; drafts stop there.
    """

    def __init__(self, engine: Engine, replies: Replies, max_position: int) -> None:
        self._engine, self._replies, self._max_position = engine, replies, max_position

    def continues(self, scheduled: ScheduledExtend, tokens: int, answer: Answer, *, alone: bool) -> bool:
        """Add the row after `tokens` more tokens. True if the token sampled from it is computed next.

        False if no token is sampled, if the model cannot take it, or if the session has a newer request (not `alone`).
        """
        scheduled.answers.append(answer.answered.select([answer.place]))
        scheduled.advance(tokens)
        if answer.token is None or not alone or scheduled.end >= self._max_position:
            return False
        scheduled.drafted.append(answer.token)
        try:
            self._engine.check_extend(Chunk(scheduled, 1).extend())
        except EngineError:
            scheduled.drafted.pop()
            return False
        if not scheduled.draws:
            self._send_drafts(scheduled)
        return True

    def finish(self, scheduled: ScheduledExtend) -> None:
        """Answer with all rows so far. If further drafts were requested, send first how many there are."""
        if scheduled.draws:
            self._send_drafts(scheduled)
        items = scheduled.answers[0].items.copy()
        items["rows"] = len(scheduled.answers)
        self._replies.rows(
            scheduled.peer, AnsweredItems(items, [part for each in scheduled.answers for part in each.parts])
        )

    def stop_drafting(self, scheduled: ScheduledExtend) -> bool:
        """Drop a draft that the cache had no room for, and answer with those before it.

        False if there is no such draft, or if `Drafted` has already announced it.
        """
        if not scheduled.is_drafting or not scheduled.draws:
            return False
        scheduled.drafted.pop()
        self.finish(scheduled)
        return True

    def _send_drafts(self, scheduled: ScheduledExtend) -> None:
        self._replies.drafted(scheduled.peer, scheduled.item.call_id, scheduled.drafted)


def sampling_of(draft: Draft) -> Sampling:
    """The sampling parameters of a draft. Raises ValueError."""
    return _sampling(draft.temperature, draft.top_p)


@lru_cache(256)
def _sampling(temperature: float, top_p: float) -> Sampling:
    return Sampling(temperature=temperature, top_p=top_p)
