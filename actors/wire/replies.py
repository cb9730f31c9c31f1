"""What a model answers, packed by columns: rows that were reduced together go out together, uncut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from actors.wire.ids import page_counts, split_ids
from actors.wire.messages import (
    DRAFTED_ITEM,
    F32,
    I32,
    REFUSED_ITEM,
    ROWS_ITEM,
    U16,
    VALUES_ITEM,
    WHOLE,
    Drafted,
    Message,
    Refusal,
    Refused,
    Rows,
    Values,
)


class Reduced(NamedTuple):
    """R rows that were reduced together to one k (WHOLE: ids [R, 0] and logits [R, width])."""

    k: int
    logsumexp: NDArray[np.float32]  # [R]
    ids: NDArray[np.int32]  # [R, k], ascending
    logits: NDArray[np.float32]  # [R, k]
    required: NDArray[np.float32]  # flat: what was asked beside, item after item and row after row


class Answer(NamedTuple):
    """The rows of one item: `rows` of `reduced` from `first` on, and `required_ids` values a row from `required` on."""

    reduced: Reduced
    first: int
    rows: int
    required: int
    required_ids: int


class Recipient(Protocol):
    """Who gets answers: a peer of the server."""

    def send(self, *messages: Message) -> None: ...


@dataclass(slots=True)
class _Mail:
    drafted: list[tuple[int, Sequence[int]]] = field(default_factory=list)
    rows: list[tuple[int, Sequence[Answer]]] = field(default_factory=list)
    values: list[tuple[Sequence[tuple[int, int]], NDArray[np.float32]]] = field(default_factory=list)
    refused: list[tuple[int, int, int]] = field(default_factory=list)


class Replies:
    """Answers to any number of peers, sent to each in one piece, as at most one frame of each kind.

    Only rows that would be longer than `frame_limit` bytes together go out in several frames, each on its own.
    width: logits in a row of this model.
    """

    def __init__(self, frame_limit: int, width: int) -> None:
        self._limit, self._width = frame_limit, width
        self._mail: dict[Recipient, _Mail] = {}

    def drafted(self, peer: Recipient, call_id: int, tokens: Sequence[int]) -> None:
        self._mail_of(peer).drafted.append((call_id, tokens))

    def rows(self, peer: Recipient, call_id: int, answers: Sequence[Answer]) -> None:
        """The rows of one item, in the order of `answers`; all of one k."""
        self._mail_of(peer).rows.append((call_id, answers))

    def values(self, peer: Recipient, items: Sequence[tuple[int, int]], values: NDArray[np.float32]) -> None:
        """The values of lookups (ticket, count), flat."""
        self._mail_of(peer).values.append((items, values))

    def refuse(self, peer: Recipient, call_id: int, code: Refusal, detail: int = 0) -> None:
        self._mail_of(peer).refused.append((call_id, code, detail))

    def flush(self, packed: int = 0, micros: int = 0) -> list[Recipient]:
        """Send everything; who got rows or a refusal, and may ask for the next.

        packed, micros: tokens in the forward that rows come from, and how long it took.
        """
        mail, self._mail = self._mail, {}
        for peer, box in mail.items():
            messages: list[Message] = [_pack_drafted(box.drafted)] if box.drafted else []
            for answers in self._frames(box.rows):
                if messages and isinstance(messages[-1], Rows):
                    peer.send(*messages)
                    messages = []
                messages.append(pack_rows(answers, self._width, packed, micros))
            if box.values:
                messages.append(_pack_values(box.values))
            if box.refused:
                messages.append(Refused(np.array(box.refused, REFUSED_ITEM)))
            peer.send(*messages)
        return [peer for peer, box in mail.items() if box.rows or box.refused]

    def _mail_of(self, peer: Recipient) -> _Mail:
        mail = self._mail.get(peer)
        if mail is None:
            mail = self._mail[peer] = _Mail()
        return mail

    def _frames(self, items: Sequence[tuple[int, Sequence[Answer]]]) -> Iterator[list[tuple[int, Sequence[Answer]]]]:
        frame: list[tuple[int, Sequence[Answer]]] = []
        size = 0
        for call_id, answers in items:
            rows = sum(answer.rows for answer in answers)
            length = answer_bytes(rows, answers[0].reduced.k, answers[0].required_ids, self._width)
            if frame and size + length > self._limit:
                yield frame
                frame, size = [], 0
            frame.append((call_id, answers))
            size += length
        if frame:
            yield frame


def answer_bytes(rows: int, k: int, required_ids: int, width: int) -> int:
    """The bytes that an answer takes in a frame."""
    return ROWS_ITEM.itemsize + rows * _row_bytes(k, required_ids, width)


@lru_cache(256)
def _row_bytes(k: int, required_ids: int, width: int) -> int:
    ids = max(k, 0) + page_counts(width)
    return F32.itemsize * (1 + required_ids + (width if k == WHOLE else max(k, 0))) + U16.itemsize * ids


class _AnswerRun:
    """Answers that stand side by side in what was reduced together."""

    __slots__ = ("first", "last", "reduced", "required", "required_end")

    def __init__(self, answer: Answer) -> None:
        self.reduced, self.first, self.required = answer.reduced, answer.first, answer.required
        self.last, self.required_end = self.first, self.required

    def extend_by(self, answer: Answer) -> bool:
        """Add an answer that begins where the last one ended; False if it does not."""
        if answer.reduced is not self.reduced or answer.first != self.last or answer.required != self.required_end:
            return False
        self.last += answer.rows
        self.required_end += answer.rows * answer.required_ids
        return True


def pack_rows(items: Sequence[tuple[int, Sequence[Answer]]], width: int, packed: int = 0, micros: int = 0) -> Rows:
    """One message from (ticket, answers) pairs."""
    table = []
    runs: list[_AnswerRun] = []
    for call_id, answers in items:
        for answer in answers:
            if not runs or not runs[-1].extend_by(answer):
                runs.append(_AnswerRun(answer))
                runs[-1].extend_by(answer)
        table.append((call_id, sum(answer.rows for answer in answers), answers[0].reduced.k, answers[0].required_ids))
    columns = np.array(table, ROWS_ITEM)
    ids = _flat([run.reduced.ids[run.first : run.last] for run in runs])
    return Rows(
        columns,
        _flat([run.reduced.logsumexp[run.first : run.last] for run in runs]),
        *split_ids(ids, np.repeat(np.maximum(columns["k"], 0), columns["rows"]), width),
        _flat([run.reduced.logits[run.first : run.last] for run in runs]),
        _flat([run.reduced.required[run.required : run.required_end] for run in runs]),
        packed,
        micros,
    )


def _pack_values(parts: Sequence[tuple[Sequence[tuple[int, int]], NDArray[np.float32]]]) -> Values:
    items = [item for pairs, _ in parts for item in pairs]
    return Values(np.array(items, VALUES_ITEM), _flat([values for _, values in parts]))


def _pack_drafted(drafted: Sequence[tuple[int, Sequence[int]]]) -> Drafted:
    items = [(call_id, len(tokens)) for call_id, tokens in drafted]
    return Drafted(np.array(items, DRAFTED_ITEM), np.array([token for _, tokens in drafted for token in tokens], I32))


def _flat(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    if len(parts) == 1:
        return parts[0].reshape(-1)
    return np.concatenate([part.reshape(-1) for part in parts])
