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
    Array,
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


def extend_items(message: Extend) -> Iterator[ExtendItem]:
    """The items of an `Extend`. Raises ProtocolError, before the first, if counts and columns do not fit."""
    items = message.items
    tokens = _parts(items["tokens"], message.tokens, "Extend.tokens")
    know = _parts(items["know"], message.know, "Extend.know")
    if (items["rows"] < 0).any():
        raise ProtocolError("Extend.items has a negative count of rows")
    return (
        ExtendItem(ticket, session, age, prefix, epoch, position, mine.tolist(), rows, k, ids)
        for (ticket, session, age, prefix, epoch, position, _, rows, k, _), mine, ids in zip(
            items.tolist(), tokens, know, strict=True
        )
    )


def lookup_items(message: Lookup) -> Iterator[RowItem]:
    """The items of a `Lookup`. Raises ProtocolError, before the first, if counts and columns do not fit."""
    parts = _parts(message.items["ids"], message.ids, "Lookup.ids")
    return (
        RowItem(ticket, session, row, epoch, position, ids, 0)
        for (ticket, session, row, epoch, position, _), ids in zip(message.items.tolist(), parts, strict=True)
    )


def widen_items(message: Widen) -> Iterator[RowItem]:
    """The items of a `Widen`."""
    return (
        RowItem(ticket, session, row, epoch, position, None, k)
        for ticket, session, row, epoch, position, k in message.items.tolist()
    )


def _parts(counts: Array, flat: Array, name: str) -> list[Array]:
    if (counts < 0).any() or counts.sum(dtype=np.int64) != len(flat):
        raise ProtocolError(f"{name} has {len(flat)} values, which is not what the items count")
    ends = counts.cumsum(dtype=np.int64).tolist()
    return [flat[end - count : end] for end, count in zip(ends, counts.tolist(), strict=True)]


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

    def send(self, message: Message) -> None: ...


@dataclass(slots=True)
class _Mail:
    rows: list[tuple[int, Answer]] = field(default_factory=list)
    values: list[tuple[int, NDArray[np.float32]]] = field(default_factory=list)
    refused: list[tuple[int, int, int]] = field(default_factory=list)


class Replies:
    """Answers to any number of peers, sent as at most one frame of each kind to each peer.

    Only rows that would be longer than `frame_limit` bytes together go out in several frames.
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
            for answers in self._frames(box.rows):
                peer.send(pack_rows(answers))
            if box.values:
                peer.send(_pack_values(box.values))
            if box.refused:
                peer.send(Refused(np.array(box.refused, REFUSED_ITEM)))
        return list(mail)

    def _of(self, peer: Recipient) -> _Mail:
        return self._mail.setdefault(peer, _Mail())

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
    return np.concatenate([part.reshape(-1) for part in parts])
