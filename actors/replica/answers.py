"""From the rows that a forward made to answers: slices, values known beside, and the tokens that drafts go on with.

Everything goes by columns over all sessions of the forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from actors.decoding.sampling import choose as choose_tokens
from actors.engine.interface import Engine
from actors.replica.scheduler import Pending
from actors.wire.messages import WHOLE
from actors.wire.replies import Answer, Reduced

DRAFT_WIDTH = 64  # of the slice that a draft is drawn from, where the answer has none
_NOTHING = np.zeros((0, 0), np.float32)


class Drawn(NamedTuple):
    """The rows of an extend that drafts, and the token drawn from the last of them."""

    answer: Answer
    token: int


def answer_all(engine: Engine, done: Sequence[Pending]) -> list[Answer | Drawn]:
    """The answers to extends whose rows were just made, in their order; rows of one k are reduced together."""
    groups: dict[tuple[int, bool], list[int]] = {}
    answers: dict[int, Answer | Drawn] = {}
    for place, pending in enumerate(done):
        if pending.item.rows:
            groups.setdefault((width_of(pending.item.k, engine.width), pending.draws), []).append(place)
        else:
            answers[place] = _nothing(pending.item.k)
    for (k, draws), places in groups.items():
        answers.update(zip(places, _answer(engine, k, draws, [done[place] for place in places]), strict=True))
    return [answers[place] for place in range(len(done))]


def _answer(engine: Engine, k: int, draws: bool, group: Sequence[Pending]) -> Iterator[Answer | Drawn]:
    sessions = [pending.item.session for pending in group]
    wide = min(DRAFT_WIDTH, engine.width) if draws and k <= 0 else max(k, 0)
    slices = engine.reduce(sessions, wide)
    ids, logits = (slices.ids, slices.logits) if wide == k else (slices.ids[:, :0], slices.logits[:, :0])
    reduced = Reduced(k, slices.logsumexp, ids, engine.whole(sessions) if k == WHOLE else logits, _known(engine, group))
    tokens = _draw(slices.ids, slices.logits, group) if draws else [None] * len(group)
    first = known = 0
    for pending, token in zip(group, tokens, strict=True):
        rows, know = pending.item.rows, len(pending.item.know)
        answer = Answer(reduced, first, rows, known, know)
        first, known = first + rows, known + rows * know
        yield answer if token is None else Drawn(answer, token)


def _draw(ids: NDArray[np.int32], logits: NDArray[np.float32], group: Sequence[Pending]) -> list[int]:
    """The next token of each extend that drafts: one row [B, k] each."""
    parameters, seeds, positions = [], [], []
    for pending in group:
        assert pending.item.draft is not None
        assert pending.sampling is not None
        parameters.append(pending.sampling)
        seeds.append(pending.item.draft.seed)
        positions.append(pending.item.draft.position + len(pending.drafted))
    tokens: list[int] = choose_tokens(
        ids, logits.astype(np.float64), parameters, np.array(seeds, np.uint64), np.array(positions)
    ).tolist()
    return tokens


def _known(engine: Engine, group: Sequence[Pending]) -> NDArray[np.float32]:
    """The logits of all rows at the ids that each of them must know, flat."""
    rows, counts, ids = [], [], []
    for pending in group:
        item = pending.item
        know, made = len(item.know), item.rows
        if know:
            held = engine.rows(item.session)
            assert held is not None, "rows are held until the session's next extend"
            for row in range(held.size - made, held.size):
                rows.append((held, row))
                counts.append(know)
                ids.append(item.know)
    if not rows:
        return _NOTHING.reshape(-1)
    return engine.values(rows, counts, ids[0] if len(ids) == 1 else np.concatenate(ids))


def width_of(k: int, width: int) -> int:
    """The k of an answer: as asked, WHOLE or at most the row's width."""
    return k if k == WHOLE else min(k, width)


def within(ids: NDArray[np.int32], width: int) -> bool:
    """Whether all of `ids` are ids of a row."""
    return not len(ids) or bool(ids.view(np.uint32).max() < width)  # a negative id is a large unsigned one


def _nothing(k: int) -> Answer:
    """The answer to an extend that asked for no rows."""
    none = _NOTHING.reshape(-1)
    return Answer(Reduced(k, none, _NOTHING.astype(np.int32), _NOTHING, none), 0, 0, 0, 0)
