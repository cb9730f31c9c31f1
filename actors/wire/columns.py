"""Between the columns of messages and single items: reading what a coordinator asks, packing what a model answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from actors.wire.messages import (
    F32,
    I32,
    REFUSED_ITEM,
    ROWS_ITEM,
    VALUES_ITEM,
    WHOLE,
    Extend,
    Lookup,
    Message,
    ProtocolError,
    Refusal,
    Refused,
    Rows,
    Values,
    Widen,
)

_NO_IDS: NDArray[np.int32] = np.zeros(0, I32)


class ExtendItem(NamedTuple):
    """One item of an `Extend`, with its part of the flat columns."""

    ticket: int
    session: int
    age: int
    prefix: int
    epoch: int
    position: int
    tokens: list[int]
    rows: int
    k: int
    know: NDArray[np.int32]


class RowItem(NamedTuple):
    """One item of a `Lookup` (`ids` is given) or of a `Widen` (`k` is)."""

    ticket: int
    session: int
    row: int
    epoch: int
    position: int
    ids: NDArray[np.int32] | None
    k: int


def extend_items(message: Extend) -> list[ExtendItem]:
    """The items of an `Extend`. Raises ProtocolError if counts and columns do not fit."""
    flat, tokens, know = message.tokens.tolist(), _Cursor("Extend.tokens"), _Cursor("Extend.know")
    items = []
    for ticket, session, age, prefix, epoch, position, count, rows, k, known in message.items.tolist():
        if rows < 0:
            raise ProtocolError("Extend.items has a negative count of rows")
        mine, ids = flat[tokens.next(count)], message.know[know.next(known)] if known else _NO_IDS
        items.append(ExtendItem(ticket, session, age, prefix, epoch, position, mine, rows, k, ids))
    tokens.finish(len(flat))
    know.finish(len(message.know))
    return items


def lookup_items(message: Lookup) -> list[RowItem]:
    """The items of a `Lookup`. Raises ProtocolError if counts and columns do not fit."""
    cursor = _Cursor("Lookup.ids")
    items = [
        RowItem(ticket, session, row, epoch, position, message.ids[cursor.next(count)], 0)
        for ticket, session, row, epoch, position, count in message.items.tolist()
    ]
    cursor.finish(len(message.ids))
    return items


def widen_items(message: Widen) -> list[RowItem]:
    """The items of a `Widen`."""
    return [
        RowItem(ticket, session, row, epoch, position, None, k)
        for ticket, session, row, epoch, position, k in message.items.tolist()
    ]


class _Cursor:
    """Cuts a flat column into the parts of its items."""

    def __init__(self, name: str) -> None:
        self._name, self._end = name, 0

    def next(self, count: int) -> slice:
        """Where the next item's part lies. Raises ProtocolError for a negative count."""
        if count < 0:
            raise ProtocolError(f"{self._name}: an item counts {count} values")
        begin, self._end = self._end, self._end + count
        return slice(begin, self._end)

    def finish(self, length: int) -> None:
        """All items are cut. Raises ProtocolError unless that is the whole column."""
        if self._end != length:
            raise ProtocolError(f"{self._name} has {length} values, the items count {self._end}")


class Answer(NamedTuple):
    """The rows of one item: R rows, reduced to k (WHOLE: ids [R, 0] and logits [R, width])."""

    k: int
    logsumexp: NDArray[np.float32]  # [R]
    ids: NDArray[np.int32]  # [R, k]
    logits: NDArray[np.float32]  # [R, k]
    known: NDArray[np.float32]  # [R, ids asked for beside]

    @property
    def nbytes(self) -> int:
        return self.logsumexp.nbytes + self.ids.nbytes + self.logits.nbytes + self.known.nbytes


def answer_bytes(rows: int, k: int, know: int, width: int) -> int:
    """The bytes that an answer takes in a frame."""
    row = F32.itemsize * (1 + know + (width if k == WHOLE else 0)) + (I32.itemsize + F32.itemsize) * max(k, 0)
    return ROWS_ITEM.itemsize + rows * row


class Recipient(Protocol):
    """Who gets answers: a peer of the server."""

    def send(self, *messages: Message) -> None: ...


@dataclass(slots=True)
class _Mail:
    rows: list[tuple[int, Answer]] = field(default_factory=list)
    values: list[tuple[int, NDArray[np.float32]]] = field(default_factory=list)
    refused: list[tuple[int, int, int]] = field(default_factory=list)


class Replies:
    """Answers to any number of peers, sent to each in one piece, as at most one frame of each kind.

    Only rows that would be longer than `frame_limit` bytes together go out in several frames, each on its own.
    """

    def __init__(self, frame_limit: int) -> None:
        self._limit = frame_limit
        self._mail: dict[Recipient, _Mail] = {}

    def rows(self, peer: Recipient, ticket: int, answer: Answer) -> None:
        self._of(peer).rows.append((ticket, answer))

    def values(self, peer: Recipient, ticket: int, values: NDArray[np.float32]) -> None:
        self._of(peer).values.append((ticket, values))

    def refuse(self, peer: Recipient, ticket: int, code: Refusal, detail: int = 0) -> None:
        self._of(peer).refused.append((ticket, code, detail))

    def flush(self) -> list[Recipient]:
        """Send everything; who got something."""
        mail, self._mail = self._mail, {}
        for peer, box in mail.items():
            messages: list[Message] = []
            for answers in self._frames(box.rows):
                if messages:
                    peer.send(messages.pop())
                messages.append(pack_rows(answers))
            if box.values:
                messages.append(_pack_values(box.values))
            if box.refused:
                messages.append(Refused(np.array(box.refused, REFUSED_ITEM)))
            peer.send(*messages)
        return list(mail)

    def _of(self, peer: Recipient) -> _Mail:
        mail = self._mail.get(peer)
        if mail is None:
            mail = self._mail[peer] = _Mail()
        return mail

    def _frames(self, answers: Sequence[tuple[int, Answer]]) -> Iterator[list[tuple[int, Answer]]]:
        frame: list[tuple[int, Answer]] = []
        size = 0
        for ticket, answer in answers:
            length = ROWS_ITEM.itemsize + answer.nbytes
            if frame and size + length > self._limit:
                yield frame
                frame, size = [], 0
            frame.append((ticket, answer))
            size += length
        if frame:
            yield frame


def pack_rows(answers: Sequence[tuple[int, Answer]]) -> Rows:
    """One message from (ticket, answer) pairs."""
    items = [(ticket, len(answer.logsumexp), answer.k, answer.known.shape[1]) for ticket, answer in answers]
    return Rows(
        np.array(items, ROWS_ITEM),
        _flat([answer.logsumexp for _, answer in answers]),
        _flat([answer.ids for _, answer in answers]),
        _flat([answer.logits for _, answer in answers]),
        _flat([answer.known for _, answer in answers]),
    )


def _pack_values(values: Sequence[tuple[int, NDArray[np.float32]]]) -> Values:
    items = [(ticket, len(part)) for ticket, part in values]
    return Values(np.array(items, VALUES_ITEM), _flat([part for _, part in values]))


def _flat(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    if len(parts) == 1:
        return parts[0].reshape(-1)
    return np.concatenate([part.reshape(-1) for part in parts])
