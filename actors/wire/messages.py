"""The messages between coordinators and models: one dataclass per tag, one byte layout per column.

A frame's body is a msgpack array `[tag, field, ...]`, with the fields in the order of the dataclass. Columns of numbers
are raw little-endian bytes. Their dtypes are fixed here, so a peer cannot choose them, and nothing is ever pickled.
Ragged columns are flat, and the item tables have the counts. The coordinator gives each item a `call_id`, which rises
with every item that it sends and identifies the item in the reply.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, NamedTuple, get_args

import msgpack
import numpy as np
from numpy.typing import NDArray

PROTOCOL = 6
WHOLE = -1  # as `k`: send whole rows instead of slices


class ProtocolError(Exception):
    """A frame is not a message of this protocol: unknown tag, wrong field or wrong length."""


class Refusal(IntEnum):
    """Reason of a refused item. The comments explain `detail` in the reply."""

    KV_MISS = 1  # detail: the number of tokens held; send the others again
    FULL = 2  # detail: milliseconds after which to try again
    SUPERSEDED = 3  # detail: the epoch of the session's owner
    ROW_GONE = 4  # the row was rewound, evicted, never computed or not read in time; extend again
    FAILED = 5  # the forward failed and the session's cache was dropped; extend from 0
    BAD_ITEM = 6  # the item is invalid (token id out of range, rows > tokens, position past the limit)


EXTEND_ITEM = np.dtype(
    [
        ("call_id", "<u8"),
        ("session", "<u8"),
        ("age", "<u8"),  # admission order over all coordinators: smaller is older and has priority
        ("prefix", "<u8"),  # running hash of the tokens before `position`
        ("epoch", "<u4"),  # of the session's owner; lower ones are refused
        ("position", "<i4"),
        ("tokens", "<i4"),  # number of this item's tokens in the flat `tokens` (at least 1)
        ("rows", "<i4"),  # number of requested logits rows: those of the last tokens
        ("k", "<i4"),  # logits per slice; 0: only the logsumexp; WHOLE: whole rows
        ("required_ids", "<i4"),  # number of this item's ids in the flat `required_ids`: requested for each row
        ("keep", "<i4"),  # rows directly before `position` that the model keeps
        ("temperature", "<f4"),  # of `Rows.tempered`, above 0
    ]
)
DRAFT_ITEM = np.dtype(
    [
        ("item", "<u4"),  # index of the frame's extend that continues with drafts
        ("drafts", "<i4"),  # number of tokens to draft after the extend's own (at least 1)
        ("seed", "<u8"),  # the session's seed: drafts are sampled with the same noise as its tokens
        ("position", "<i4"),  # of the first draft in the noise; each further draft is one later
        ("temperature", "<f4"),
        ("top_p", "<f4"),
    ]
)
DRAFTED_ITEM = np.dtype([("call_id", "<u8"), ("tokens", "<i4")])
FORKED_ITEM = np.dtype([("call_id", "<u8"), ("tokens", "<i4")])
LOOKUP_ITEM = np.dtype(
    [
        ("call_id", "<u8"),
        ("session", "<u8"),
        ("row", "<u8"),  # running hash of the tokens up to the row's own
        ("epoch", "<u4"),
        ("position", "<i4"),  # of the row's own token
        ("ids", "<i4"),  # number of this item's ids in the flat `ids`
    ]
)
WIDEN_ITEM = np.dtype(
    [
        ("call_id", "<u8"),
        ("session", "<u8"),
        ("row", "<u8"),
        ("epoch", "<u4"),
        ("position", "<i4"),
        ("k", "<i4"),
    ]
)
ROWS_ITEM = np.dtype(
    [
        ("call_id", "<u8"),
        ("rows", "<i4"),
        ("k", "<i4"),  # as requested, at most the model's width; WHOLE: no ids, and width values per row
        ("required_ids", "<i4"),  # required values per row, beside the slice
    ]
)
VALUES_ITEM = np.dtype([("call_id", "<u8"), ("values", "<i4")])
REFUSED_ITEM = np.dtype([("call_id", "<u8"), ("code", "<i4"), ("detail", "<i8")])

U16, I32, F32, U64 = np.dtype("<u2"), np.dtype("<i4"), np.dtype("<f4"), np.dtype("<u8")
Array = NDArray[Any]


def column(dtype: np.dtype[Any]) -> Any:
    """A field for a one-dimensional array of this dtype (default: empty)."""
    return dataclasses.field(default_factory=lambda: np.zeros(0, dtype), metadata={"dtype": dtype})


@dataclass(frozen=True, slots=True, eq=False)
class Hello:
    """Coordinator to model, the first frame. `incarnation` is the expected one ("" for any)."""

    tag: ClassVar[int] = 1
    protocol: int
    nonce: bytes = dataclasses.field(repr=False)
    incarnation: str
    peer: str


@dataclass(frozen=True, slots=True, eq=False)
class Challenge:
    """Model to coordinator: its nonce, and the proof that it knows the secret."""

    tag: ClassVar[int] = 2
    nonce: bytes = dataclasses.field(repr=False)
    proof: bytes = dataclasses.field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Proof:
    """Coordinator to model: the proof that it knows the secret too."""

    tag: ClassVar[int] = 3
    proof: bytes = dataclasses.field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Welcome:
    """Model to coordinator: the model's properties. The connection is open."""

    tag: ClassVar[int] = 4
    role: str
    incarnation: str
    width: int  # logits per row
    hash_seed: int  # start of this model's running hashes
    cache_tokens: int
    max_position: int  # most tokens per session
    batch_invariant: bool
    devices: str  # names of the hardware that the model computes on, with spaces between; empty if unknown


@dataclass(frozen=True, slots=True, eq=False)
class Extend:
    """Append tokens to sessions, and request the logits rows of the last of them. May have no item, only `released`.

    An item that drafts requests one row, that of its last token. The model samples a token from the newest row, appends
    it, and repeats this. It answers twice: with `Drafted` once the last draft is sampled, and with `Rows` once all rows
    are computed, 1 + drafts of them.
    """

    tag: ClassVar[int] = 5
    items: Array = column(EXTEND_ITEM)
    tokens: Array = column(I32)
    required_ids: Array = column(I32)
    released: Array = column(U64)  # ended sessions, whose cache may be freed
    drafting: Array = column(DRAFT_ITEM)


@dataclass(frozen=True, slots=True, eq=False)
class Lookup:
    """Request the logits of held rows at given ids. A lookup of a row that is still being computed waits for it.

    `ids` and `pages` are the ids of all items, encoded by `actors.wire.ids`.
    """

    tag: ClassVar[int] = 6
    items: Array = column(LOOKUP_ITEM)
    ids: Array = column(U16)
    pages: Array = column(U16)


@dataclass(frozen=True, slots=True, eq=False)
class Widen:
    """Request wider slices of held rows, or whole rows."""

    tag: ClassVar[int] = 7
    items: Array = column(WIDEN_ITEM)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of items of `Extend` or `Widen`. Rows in one message come from one forward.

    `logsumexp` has one value per row. `tempered` has the logsumexp of its logits over the temperature of the `Extend`;
    for a `Widen` it repeats the plain one. `ids` and `logits` have k per row, ids ascending; a whole row has no ids and
    `width` logits. `required` has the logits at `Extend.required_ids`, row after row. `ids` and `pages` are the ids of
    all slices, encoded by `actors.wire.ids`. `packed` is the number of tokens in the forward, `micros` its duration in
    microseconds; both are 0 if no forward was needed. Without items it says that a chunk of an extend was computed.
    """

    tag: ClassVar[int] = 8
    items: Array = column(ROWS_ITEM)
    logsumexp: Array = column(F32)
    tempered: Array = column(F32)
    ids: Array = column(U16)
    pages: Array = column(U16)
    logits: Array = column(F32)
    required: Array = column(F32)
    packed: int = 0
    micros: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """Answers to items of `Lookup`, in the order of the requested ids."""

    tag: ClassVar[int] = 9
    items: Array = column(VALUES_ITEM)
    values: Array = column(F32)


@dataclass(frozen=True, slots=True, eq=False)
class Refused:
    """Refused items, with the reasons (`Refusal`)."""

    tag: ClassVar[int] = 10
    items: Array = column(REFUSED_ITEM)


@dataclass(frozen=True, slots=True, eq=False)
class Drafted:
    """The drafted tokens of items of `Extend`. Their rows follow in `Rows`."""

    tag: ClassVar[int] = 12
    items: Array = column(DRAFTED_ITEM)
    tokens: Array = column(I32)


@dataclass(frozen=True, slots=True, eq=False)
class Forked:
    """Items of `Extend` whose first tokens were copied from another session's cache, and how many. `Rows` follow."""

    tag: ClassVar[int] = 14
    items: Array = column(FORKED_ITEM)


@dataclass(frozen=True, slots=True, eq=False)
class Failure:
    """The last frame before a connection is closed because of an error: a stable code, and a message for people."""

    tag: ClassVar[int] = 11
    code: str
    message: str


@dataclass(frozen=True, slots=True, eq=False)
class Ping:
    """In both directions: keep-alive of a sender that has nothing else to send. It has no answer."""

    tag: ClassVar[int] = 13


Message = (
    Hello
    | Challenge
    | Proof
    | Welcome
    | Extend
    | Lookup
    | Widen
    | Rows
    | Values
    | Refused
    | Failure
    | Drafted
    | Ping
    | Forked
)
MESSAGES: dict[int, type[Message]] = {kind.tag: kind for kind in get_args(Message)}
_SCALARS: dict[str, type] = {"int": int, "str": str, "bytes": bytes, "bool": bool}


class _Field(NamedTuple):
    """One field of a message: a scalar of a `type`, or a column of a `dtype`."""

    name: str
    type: type | None
    dtype: np.dtype[Any]
    itemsize: int
    empty: Array  # most columns of most messages are empty


def _layout(kind: type[Message]) -> tuple[_Field, ...]:
    fields = []
    for field in dataclasses.fields(kind):
        dtype = field.metadata.get("dtype", np.dtype("u1"))
        scalar = None if "dtype" in field.metadata else _SCALARS[str(field.type)]
        fields.append(_Field(field.name, scalar, dtype, dtype.itemsize, np.frombuffer(b"", dtype)))
    return tuple(fields)


_FIELDS = {tag: _layout(kind) for tag, kind in MESSAGES.items()}
_LONGEST = 1 + max(len(fields) for fields in _FIELDS.values())


def encode(message: Message) -> bytes:
    """The body of the frame for `message`."""
    parts: list[Any] = [message.tag]
    for field in _FIELDS[message.tag]:
        value = getattr(message, field.name)
        parts.append(np.asarray(value, field.dtype).tobytes() if field.type is None else value)
    packed: bytes = msgpack.packb(parts)
    return packed


def decode(body: bytes | memoryview) -> Message:
    """The message in a frame's body. Its arrays are read-only views. Raises ProtocolError for anything else."""
    try:
        parts = msgpack.unpackb(body, use_list=True, max_array_len=_LONGEST, max_ext_len=0, max_map_len=0)
    except Exception as error:
        raise ProtocolError(f"the frame is not msgpack of this protocol: {error}") from None
    if not isinstance(parts, list) or not parts or type(parts[0]) is not int or parts[0] not in MESSAGES:
        raise ProtocolError("the frame does not begin with a known message tag")
    kind, fields = MESSAGES[parts[0]], _FIELDS[parts[0]]
    if len(parts) != len(fields) + 1:
        raise ProtocolError(f"{kind.__name__} has {len(fields)} fields, the frame has {len(parts) - 1}")
    for place, field in enumerate(fields, 1):
        value = parts[place]
        if field.type is not None:
            if type(value) is not field.type:
                raise ProtocolError(f"{kind.__name__}.{field.name} is not of type {field.type.__name__}")
        elif type(value) is not bytes or len(value) % field.itemsize:
            raise ProtocolError(f"{kind.__name__}.{field.name} is not a column of {field.itemsize}-byte items")
        else:
            parts[place] = np.frombuffer(value, field.dtype) if value else field.empty
    return kind(*parts[1:])
