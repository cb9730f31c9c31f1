"""Packs a model's answers by columns. Rows that were reduced together are sent together, without copying them apart."""

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
    tempered: NDArray[np.float32]  # [R], the logsumexp of the logits over the requested temperature
    ids: NDArray[np.int32]  # [R, k], ascending
    logits: NDArray[np.float32]  # [R, k]
    required: NDArray[np.float32]  # flat: logits at the required ids, item after item, row after row


class Answer(NamedTuple):
    """One item's part of `reduced`: `rows` rows from `first`, and `required_ids` values per row from `required`."""

    reduced: Reduced
    first: int
    rows: int
    required: int
    required_ids: int


class Recipient(Protocol):
    """A receiver of answers: a peer of the server."""

    def send(self, *messages: Message) -> None: ...


@dataclass(slots=True)
class _Mail:
    drafted: list[tuple[int, Sequence[int]]] = field(default_factory=list)
    rows: list[tuple[int, Sequence[Answer]]] = field(default_factory=list)
    values: list[tuple[Sequence[tuple[int, int]], NDArray[np.float32]]] = field(default_factory=list)
    refused: list[tuple[int, int, int]] = field(default_factory=list)


class Replies:
    """Collects answers to all peers. `flush` sends each peer its own in one piece, with at most one frame of a kind.

    Only rows that exceed `frame_limit` bytes together are split into several frames, each written separately.
    width: logits in a row of this model.
    """

    def __init__(self, frame_limit: int, width: int) -> None:
        self._limit, self._width = frame_limit, width
        self._mail: dict[Recipient, _Mail] = {}

    def drafted(self, peer: Recipient, call_id: int, tokens: Sequence[int]) -> None:
        self._mail_of(peer).drafted.append((call_id, tokens))

    def rows(self, peer: Recipient, call_id: int, answers: Sequence[Answer]) -> None:
        """Add the rows of one item, in the order of `answers`. They all have the same k."""
        self._mail_of(peer).rows.append((call_id, answers))

    def values(self, peer: Recipient, items: Sequence[tuple[int, int]], values: NDArray[np.float32]) -> None:
        """Add the flat values of lookups. items: (call_id, number of values)."""
        self._mail_of(peer).values.append((items, values))

    def refuse(self, peer: Recipient, call_id: int, code: Refusal, detail: int = 0) -> None:
        self._mail_of(peer).refused.append((call_id, code, detail))

    def flush(self, packed: int = 0, micros: int = 0) -> list[Recipient]:
        """Send everything. Returns the peers that got rows or a refusal, and so may send their next extend.

        packed, micros: the tokens in the forward of the rows, and its duration in microseconds.
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
    """The bytes of an answer in a frame."""
    return ROWS_ITEM.itemsize + rows * _row_bytes(k, required_ids, width)


@lru_cache(256)
def _row_bytes(k: int, required_ids: int, width: int) -> int:
    ids = max(k, 0) + page_counts(width)
    return F32.itemsize * (2 + required_ids + (width if k == WHOLE else max(k, 0))) + U16.itemsize * ids


class _AnswerRun:
    """Answers whose rows are adjacent in one `Reduced`, so that they can be sent as one slice of it."""

    __slots__ = ("first", "last", "reduced", "required", "required_end")

    def __init__(self, answer: Answer) -> None:
        self.reduced, self.first, self.required = answer.reduced, answer.first, answer.required
        self.last, self.required_end = self.first, self.required

    def extend_by(self, answer: Answer) -> bool:
        """Add an answer if its rows and values begin where the last one's end. False if they do not."""
        if answer.reduced is not self.reduced or answer.first != self.last or answer.required != self.required_end:
            return False
        self.last += answer.rows
        self.required_end += answer.rows * answer.required_ids
        return True


def pack_rows(items: Sequence[tuple[int, Sequence[Answer]]], width: int, packed: int = 0, micros: int = 0) -> Rows:
    """Pack (call_id, answers) pairs into one message.

    Example, a forward reduced rows 0 to 4 to one k: item A has row 0, item B rows 1 and 2, and item C, of another peer,
    rows 3 and 4. For the peer of A and B, both are one run: rows 0 to 2 are sent as one slice, without a copy. If A and
    C belonged to one peer, rows 0 and 3 to 4 would be two runs, which are concatenated.
    """
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
        _flat([run.reduced.tempered[run.first : run.last] for run in runs]),
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
