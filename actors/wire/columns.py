"""Converts between the columns of messages and single items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actors.wire.ids import join_ids, split_ids
from actors.wire.messages import (
    DRAFT_ITEM,
    EXTEND_ITEM,
    I32,
    Drafted,
    Extend,
    Lookup,
    ProtocolError,
    Rows,
    Widen,
)

NO_IDS: NDArray[np.int32] = np.zeros(0, I32)


class Draft(NamedTuple):
    """Parameters of the drafts that follow an extend (`DRAFT_ITEM`)."""

    drafts: int
    seed: int
    position: int
    temperature: float
    top_p: float


class ExtendItem(NamedTuple):
    """One item of an `Extend`, with its part of the flat columns."""

    call_id: int
    session: int
    age: int
    prefix: int
    epoch: int
    position: int
    tokens: list[int]
    rows: int
    k: int
    required_ids: NDArray[np.int32]
    draft: Draft | None = None
    keep: int = 0
    temperature: float = 1.0

    @property
    def end(self) -> int:
        """The position after the item's last token."""
        return self.position + len(self.tokens)


class RowRequest(NamedTuple):
    """An item of a `Lookup` or a `Widen`: a row, and `size`, the number of requested ids or the slice's `k`."""

    call_id: int
    session: int
    row: int
    epoch: int
    position: int
    size: int


class ExtendColumns(NamedTuple):
    """Items of an `Extend` as columns. drafting: by index of an item, the parameters of its drafts."""

    items: NDArray[Any]  # EXTEND_ITEM
    tokens: list[int]  # of all items, one after another
    required_ids: NDArray[np.int32]  # of all items, one after another
    drafting: dict[int, Draft]


def join_items(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Tables of one dtype, one after another. `np.concatenate` takes longer to compare their fields than to copy."""
    return parts[0] if len(parts) == 1 else np.frombuffer(b"".join(part.tobytes() for part in parts), parts[0].dtype)


def pack_extends(parts: Sequence[ExtendColumns], released: Sequence[int]) -> Extend:
    """An `Extend` of the items of all parts. released: sessions that are over."""
    tokens: list[int] = []
    drafting, begin = [], 0
    for part in parts:
        tokens += part.tokens
        drafting += [(begin + place, *draft) for place, draft in part.drafting.items()]
        begin += len(part.items)
    if not parts:
        items, required_ids = np.zeros(0, EXTEND_ITEM), NO_IDS
    else:
        items = join_items([part.items for part in parts])
        required_ids = np.concatenate([part.required_ids for part in parts])
    return Extend(items, np.array(tokens, I32), required_ids, np.array(released, "<u8"), np.array(drafting, DRAFT_ITEM))


def extend_items(message: Extend) -> list[ExtendItem]:
    """The items of an `Extend`. Raises ProtocolError if counts and columns do not fit."""
    table, all_tokens, all_ids, drafts = message.items, message.tokens.tolist(), message.required_ids, _drafts(message)
    if min(table[name].min(initial=0) for name in ("tokens", "rows", "required_ids", "keep")) < 0:
        raise ProtocolError("Extend.items has a negative count")
    counted = int(table["tokens"].sum()), int(table["required_ids"].sum())
    if counted != (len(all_tokens), len(all_ids)):
        raise ProtocolError(
            f"Extend counts {counted} tokens and ids, its columns have {len(all_tokens)}, {len(all_ids)}"
        )
    items = []
    token = required = 0
    for place, row in enumerate(table.tolist()):
        call_id, session, age, prefix, epoch, position, count, rows, k, ids, keep, temperature = row
        tokens = all_tokens[token : token + count]
        required_ids = all_ids[required : required + ids] if ids else NO_IDS
        draft = drafts.get(place)
        whole = call_id, session, age, prefix, epoch, position, tokens, rows, k, required_ids, draft, keep, temperature
        items.append(ExtendItem._make(whole))
        token, required = token + count, required + ids
    return items


def _drafts(message: Extend) -> dict[int, Draft]:
    """Drafts by the index of their item. Raises ProtocolError for an index that is out of range or given twice."""
    drafts = {place: Draft(*how) for place, *how in message.drafting.tolist()}
    if len(drafts) < len(message.drafting) or (drafts and max(drafts) >= len(message.items)):
        raise ProtocolError("Extend.drafting names an item twice, or one that is not there")
    return drafts


def pack_lookups(items: NDArray[Any], ids: NDArray[Any], width: int) -> Lookup:
    """A `Lookup` of items (`LOOKUP_ITEM`), with the flat ids of all: per item in the order of their pages."""
    return Lookup(items, *split_ids(ids, items["ids"], width))


def lookup_items(message: Lookup, width: int) -> tuple[list[RowRequest], NDArray[np.int32]]:
    """The items of a `Lookup` and the flat ids of all. Raises ProtocolError if counts and columns do not fit."""
    ids = _joined(message, message.items["ids"], width)
    return list(map(RowRequest._make, message.items.tolist())), ids


def widen_items(message: Widen) -> list[RowRequest]:
    """The items of a `Widen`."""
    return list(map(RowRequest._make, message.items.tolist()))


def rows_ids(message: Rows, width: int) -> NDArray[np.int32]:
    """The flat ids of all slices. Each row has an entry in `pages`, even without ids. Raises ProtocolError."""
    rows = message.items["rows"]
    if len(rows) and rows.min() < 0:
        raise ProtocolError("Rows.items has a negative count")
    return _joined(message, np.repeat(np.maximum(message.items["k"], 0), rows), width)


def drafted_items(message: Drafted) -> list[tuple[int, list[int]]]:
    """(call_id, drafted tokens) of each item. Raises ProtocolError if counts and columns do not fit."""
    items, flat, begin = [], message.tokens.tolist(), 0
    for call_id, count in message.items.tolist():
        if count < 0:
            raise ProtocolError("Drafted.items has a negative count")
        items.append((call_id, flat[begin : begin + count]))
        begin += count
    if begin != len(flat):
        raise ProtocolError(f"Drafted counts {begin} tokens, its column has {len(flat)}")
    return items


def _joined(message: Lookup | Rows, counts: NDArray[Any], width: int) -> NDArray[np.int32]:
    try:
        return join_ids(message.ids, message.pages, counts, width)
    except ValueError as error:
        raise ProtocolError(f"{type(message).__name__}: {error}") from None
