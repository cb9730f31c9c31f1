"""Packs a model's answers by columns. Rows that were reduced together are sent together, without copying them apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from actors.wire.ids import page_counts, split_ids
from actors.wire.messages import (
    DRAFTED_ITEM,
    F32,
    FORKED_ITEM,
    I32,
    REFUSED_ITEM,
    ROWS_ITEM,
    U16,
    WHOLE,
    Drafted,
    Forked,
    Message,
    Refusal,
    Refused,
    Rows,
    Values,
)


class Reduced(NamedTuple):
    """R rows that were reduced together to one k (WHOLE: ids [R, 0] and logits [R, width])."""

    logsumexp: NDArray[np.float32]  # [R]
    tempered: NDArray[np.float32]  # [R], the logsumexp of the logits over the requested temperature
    ids: NDArray[np.int32]  # [R, k], ascending
    logits: NDArray[np.float32]  # [R, k]
    required: NDArray[np.float32]  # flat: logits at the required ids, item after item, row after row


class AnsweredItems(NamedTuple):
    """Items and their rows. The rows of all items, one after another, are those of all parts."""

    items: NDArray[Any]  # ROWS_ITEM
    parts: Sequence[Reduced]  # one; of a single item that drafts, one for each forward

    def select(self, places: Sequence[int]) -> AnsweredItems:
        """The items at `places`, which ascend, and their rows. Copies nothing if these are all items."""
        if len(places) == len(self.items):
            return self
        (reduced,) = self.parts
        selected = np.zeros(len(self.items), bool)
        selected[places] = True
        rows = np.repeat(selected, self.items["rows"])
        required = np.repeat(selected, self.items["rows"] * self.items["required_ids"])
        logsumexp, tempered, ids, logits, values = reduced
        part = Reduced(logsumexp[rows], tempered[rows], ids[rows], logits[rows], values[required])
        return AnsweredItems(self.items[selected], [part])


class Recipient(Protocol):
    """A receiver of answers: a peer of the server."""

    def send(self, *messages: Message) -> None: ...


@dataclass(slots=True)
class _Mail:
    drafted: list[tuple[int, Sequence[int]]] = field(default_factory=list)
    forked: list[tuple[int, int]] = field(default_factory=list)
    rows: list[tuple[AnsweredItems, list[int]]] = field(default_factory=list)
    values: list[tuple[NDArray[Any], NDArray[np.float32]]] = field(default_factory=list)
    refused: list[tuple[int, int, int]] = field(default_factory=list)
    progressed: bool = False


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

    def forked(self, peer: Recipient, call_id: int, tokens: int) -> None:
        """Say that so many first tokens of an extend were copied from another session's cache."""
        self._mail_of(peer).forked.append((call_id, tokens))

    def progressed(self, peer: Recipient) -> None:
        """Say that a forward has computed a chunk of an extend that has more: if nothing else, by `Rows` of no item."""
        self._mail_of(peer).progressed = True

    def rows(self, peer: Recipient, answered: AnsweredItems, place: int = 0) -> None:
        """Add the item at `place` of `answered`. Items that are added in their order are sent together."""
        rows = self._mail_of(peer).rows
        if rows and rows[-1][0] is answered:
            rows[-1][1].append(place)
        else:
            rows.append((answered, [place]))

    def values(self, peer: Recipient, items: NDArray[Any], values: NDArray[np.float32]) -> None:
        """Add the flat values of lookups. items: VALUES_ITEM."""
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
            if box.forked:
                messages.append(Forked(np.array(box.forked, FORKED_ITEM)))
            for answers in self._frames([answered.select(places) for answered, places in box.rows]):
                if messages and isinstance(messages[-1], Rows):
                    peer.send(*messages)
                    messages = []
                messages.append(pack_rows(answers, self._width, packed, micros))
            if box.progressed and not box.rows:
                messages.append(_no_rows(packed, micros))
            if box.values:
                messages.append(Values(*(_flat(column) for column in zip(*box.values, strict=True))))
            if box.refused:
                messages.append(Refused(np.array(box.refused, REFUSED_ITEM)))
            peer.send(*messages)
        return [peer for peer, box in mail.items() if box.rows or box.refused]

    def _mail_of(self, peer: Recipient) -> _Mail:
        mail = self._mail.get(peer)
        if mail is None:
            mail = self._mail[peer] = _Mail()
        return mail

    def _frames(self, answers: Sequence[AnsweredItems]) -> Iterator[Sequence[AnsweredItems]]:
        """The answers that go into each frame: all, or as many items as fit."""
        tables = [each.items for each in answers]
        sizes = [answer_bytes(table["rows"], table["k"], table["required_ids"], self._width) for table in tables]
        if sum(int(lengths.sum()) for lengths in sizes) <= self._limit:
            if answers:
                yield answers
            return
        frame: list[AnsweredItems] = []
        size = 0
        for each, lengths in zip(answers, sizes, strict=True):
            for place, length in enumerate(lengths.tolist()):
                if frame and size + length > self._limit:
                    yield frame
                    frame, size = [], 0
                frame.append(each.select([place]))
                size += length
        yield frame


def answer_bytes(rows: Any, k: Any, required_ids: Any, width: int) -> Any:
    """The bytes of an answer in a frame. Takes numbers or columns of them."""
    ids = np.maximum(k, 0)
    values = 2 + np.asarray(required_ids, np.int64) + np.where(k == WHOLE, width, ids)
    return ROWS_ITEM.itemsize + rows * (F32.itemsize * values + U16.itemsize * (ids + page_counts(width)))


def pack_rows(answers: Sequence[AnsweredItems], width: int, packed: int = 0, micros: int = 0) -> Rows:
    """Pack answers into one message. A single reduction is sent as it is, without a copy."""
    items = _flat([each.items for each in answers])
    logsumexp, tempered, ids, logits, required = (
        _flat(column) for column in zip(*(part for each in answers for part in each.parts), strict=True)
    )
    low, pages = split_ids(ids, np.repeat(np.maximum(items["k"], 0), items["rows"]), width)
    return Rows(items, logsumexp, tempered, low, pages, logits, required, packed, micros)


def _no_rows(packed: int, micros: int) -> Rows:
    none, ids = np.zeros(0, F32), np.zeros(0, U16)
    return Rows(np.zeros(0, ROWS_ITEM), none, none, ids, ids, none, none, packed, micros)


def _pack_drafted(drafted: Sequence[tuple[int, Sequence[int]]]) -> Drafted:
    items = [(call_id, len(tokens)) for call_id, tokens in drafted]
    return Drafted(np.array(items, DRAFTED_ITEM), np.array([token for _, tokens in drafted for token in tokens], I32))


def _flat(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    if len(parts) == 1:
        return parts[0].reshape(-1)
    return np.concatenate([part.reshape(-1) for part in parts])
