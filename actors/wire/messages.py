"""What coordinators and models say to each other: one typed message per tag, one byte layout per column.

A frame's body is a msgpack array `[tag, field, ...]`, its fields in the order of the dataclass. Columns of numbers
travel as raw little-endian bytes whose dtype is fixed here, so a peer cannot choose it and nothing is ever pickled.
Ragged columns are flat; the counts stand in the item tables. A `call_id` is drawn by the coordinator, rises with every
item that it sends, and names the item in the reply.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, NamedTuple, get_args

import msgpack
import numpy as np
from numpy.typing import NDArray

PROTOCOL = 4
WHOLE = -1  # as `k`: send whole rows instead of slices


class ProtocolError(Exception):
    """A frame that is not a message of this protocol: unknown tag, wrong field, wrong length."""


class Refusal(IntEnum):
    """Why an item was not done. `detail` in the reply is explained beside each."""

    KV_MISS = 1  # detail: how many tokens are held; send again from there
    FULL = 2  # detail: milliseconds after which to try again
    SUPERSEDED = 3  # detail: the epoch that owns the session now
    ROW_GONE = 4  # the row was rewound, evicted or never computed: extend again
    FAILED = 5  # the forward failed; the session's cache was dropped: extend from 0
    BAD_ITEM = 6  # the item contradicts itself (token id out of range, rows > tokens, position past the limit)


EXTEND_ITEM = np.dtype(
    [
        ("call_id", "<u8"),
        ("session", "<u8"),
        ("age", "<u8"),  # global admission age: smaller is older, and older is served first
        ("prefix", "<u8"),  # running hash of the tokens before `position`
        ("epoch", "<u4"),  # who owns the session now; lower ones are refused
        ("position", "<i4"),
        ("tokens", "<i4"),  # how many of the flat `tokens` are this item's (at least 1)
        ("rows", "<i4"),  # logits rows wanted, for the last so many tokens
        ("k", "<i4"),  # width of the slices; 0: only logsumexp; WHOLE: whole rows
        ("required_ids", "<i4"),  # how many of the flat `required_ids` are this item's: ids wanted for each of its rows
        ("keep", "<i4"),  # rows of earlier extends, directly before `position`, that stay held
    ]
)
DRAFT_ITEM = np.dtype(
    [
        ("item", "<u4"),  # which of the frame's extends goes on by drafting
        ("drafts", "<i4"),  # tokens to draft (at least 1) after the extend's own
        ("seed", "<u8"),  # of the session's choices: drafts are drawn with the same noise
        ("position", "<i4"),  # of the first drafted token in the noise; each further draft is one later
        ("temperature", "<f4"),
        ("top_p", "<f4"),
    ]
)
DRAFTED_ITEM = np.dtype([("call_id", "<u8"), ("tokens", "<i4")])
LOOKUP_ITEM = np.dtype(
    [
        ("call_id", "<u8"),
        ("session", "<u8"),
        ("row", "<u8"),  # running hash of the row's tokens, its own included
        ("epoch", "<u4"),
        ("position", "<i4"),  # of the row's own token
        ("ids", "<i4"),  # how many of the flat `ids` are this item's
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
        ("k", "<i4"),  # as asked, or the model's width if that is smaller; WHOLE: no ids, width values a row
        ("required_ids", "<i4"),  # values per row beside the slice
    ]
)
VALUES_ITEM = np.dtype([("call_id", "<u8"), ("values", "<i4")])
REFUSED_ITEM = np.dtype([("call_id", "<u8"), ("code", "<i4"), ("detail", "<i8")])

U16, I32, F32, U64 = np.dtype("<u2"), np.dtype("<i4"), np.dtype("<f4"), np.dtype("<u8")
Array = NDArray[Any]


def column(dtype: np.dtype[Any]) -> Any:
    """A field that holds a one-dimensional array of this dtype (default: empty)."""
    return dataclasses.field(default_factory=lambda: np.zeros(0, dtype), metadata={"dtype": dtype})


@dataclass(frozen=True, slots=True, eq=False)
class Hello:
    """Coordinator to model, first frame. `incarnation` is the one it believes it speaks to ("" if it knows none)."""

    tag: ClassVar[int] = 1
    protocol: int
    nonce: bytes = dataclasses.field(repr=False)
    incarnation: str
    peer: str


@dataclass(frozen=True, slots=True, eq=False)
class Challenge:
    """Model to coordinator: its nonce, and proof that it knows the secret."""

    tag: ClassVar[int] = 2
    nonce: bytes = dataclasses.field(repr=False)
    proof: bytes = dataclasses.field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Proof:
    """Coordinator to model: proof that it knows the secret too."""

    tag: ClassVar[int] = 3
    proof: bytes = dataclasses.field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Welcome:
    """Model to coordinator: who it is. The connection is open."""

    tag: ClassVar[int] = 4
    role: str
    incarnation: str
    width: int  # logits per row
    hash_seed: int  # running hashes of this model start here
    cache_tokens: int
    max_position: int  # tokens per session the model was built for
    batch_invariant: bool


@dataclass(frozen=True, slots=True, eq=False)
class Extend:
    """Append tokens to sessions and return logits rows for the last of them. May carry no item, only `released`.

    An item that drafts asks for one row, that of its last token, and goes on: the model chooses a token from the newest
    row, appends it, and so on. It is answered twice: by `Drafted` as soon as its last draft is chosen, and by `Rows`
    when the rows of all drafts are there, 1 + drafts of them.
    """

    tag: ClassVar[int] = 5
    items: Array = column(EXTEND_ITEM)
    tokens: Array = column(I32)
    required_ids: Array = column(I32)
    released: Array = column(U64)  # sessions that are over: their cache may go
    drafting: Array = column(DRAFT_ITEM)


@dataclass(frozen=True, slots=True, eq=False)
class Lookup:
    """Exact logits of held rows at given ids. A lookup for a row still being computed waits for it.

    `ids` and `pages` are the ids of all items as `actors.wire.ids` writes them.
    """

    tag: ClassVar[int] = 6
    items: Array = column(LOOKUP_ITEM)
    ids: Array = column(U16)
    pages: Array = column(U16)


@dataclass(frozen=True, slots=True, eq=False)
class Widen:
    """Wider slices, or the whole, of held rows."""

    tag: ClassVar[int] = 7
    items: Array = column(WIDEN_ITEM)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of some items of `Extend` or `Widen`: those that went through one forward together.

    `logsumexp` has one value a row; `ids` and `logits` k a row, ids ascending (a whole row has no ids and `width`
    logits); `required` has the logits at `Extend.required_ids`, row after row. `ids` and `pages` are the ids of all
    slices, each a row, as `actors.wire.ids` writes them. `packed`: tokens in the forward that they come from,
    `micros`: how long it took; 0 where rows did not need one.
    """

    tag: ClassVar[int] = 8
    items: Array = column(ROWS_ITEM)
    logsumexp: Array = column(F32)
    ids: Array = column(U16)
    pages: Array = column(U16)
    logits: Array = column(F32)
    required: Array = column(F32)
    packed: int = 0
    micros: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """Answers to items of `Lookup`, in the order of the ids asked for."""

    tag: ClassVar[int] = 9
    items: Array = column(VALUES_ITEM)
    values: Array = column(F32)


@dataclass(frozen=True, slots=True, eq=False)
class Refused:
    """Items that were not done, and why (`Refusal`)."""

    tag: ClassVar[int] = 10
    items: Array = column(REFUSED_ITEM)


@dataclass(frozen=True, slots=True, eq=False)
class Drafted:
    """The drafted tokens of some items of `Extend`; their rows follow."""

    tag: ClassVar[int] = 12
    items: Array = column(DRAFTED_ITEM)
    tokens: Array = column(I32)


@dataclass(frozen=True, slots=True, eq=False)
class Failure:
    """The last frame before a connection is closed for a reason: a stable code and a sentence for a person."""

    tag: ClassVar[int] = 11
    code: str
    message: str


@dataclass(frozen=True, slots=True, eq=False)
class Ping:
    """Either way: the sender lives, and has nothing else to say. Nobody answers."""

    tag: ClassVar[int] = 13


Message = (
    Hello | Challenge | Proof | Welcome | Extend | Lookup | Widen | Rows | Values | Refused | Failure | Drafted | Ping
)
MESSAGES: dict[int, type[Message]] = {kind.tag: kind for kind in get_args(Message)}
_SCALARS: dict[str, type] = {"int": int, "str": str, "bytes": bytes, "bool": bool}


class _Field(NamedTuple):
    """One field of a message: a scalar of a `type`, or a column of a `dtype`."""

    name: str
    type: type | None
    dtype: np.dtype[Any]
    itemsize: int
    empty: Array  # what most columns of most messages are


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
    """The body of the frame that carries `message`."""
    parts: list[Any] = [message.tag]
    for field in _FIELDS[message.tag]:
        value = getattr(message, field.name)
        parts.append(np.asarray(value, field.dtype).tobytes() if field.type is None else value)
    packed: bytes = msgpack.packb(parts)
    return packed


def decode(body: bytes | memoryview) -> Message:
    """The message in a frame's body. Raises ProtocolError for anything that is not one. Arrays are read-only views."""
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
