"""Holds logits rows on the device for later lookups, and reduces rows to top-k slices.

Rows are float32. A row's key is its position and the running hash *including* its own token: the position alone would
confuse the row of a rejected draft with the one that replaced it.

On a GPU, the rows of a forward are reduced on its own stream, behind it. Lookups have a stream of their own, with a
higher priority: it waits for the forwards that computed the rows, and not for the one that runs meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.engine.inputs import upload
from actors.engine.interface import TopKSlices
from actors.engine.memory import MAX_ROWS, MIN_ROWS, REDUCED_ROWS, host_bytes

_ROWS_SHARE = 1 / 32  # of the memory; three roles may share a device


@dataclass(frozen=True, slots=True, eq=False)
class RowBlock:
    """The rows of one forward. They stay in memory until no session holds one of them and no lookup reads one."""

    logits: Tensor  # [B, V] float32 on the device of the model's head, padding included
    computed: torch.cuda.Event | None = None  # on a GPU: recorded behind the forward

    @classmethod
    def behind_forward(cls, logits: Tensor) -> RowBlock:
        """The rows that the current stream has been told to compute."""
        on_gpu = logits.device.type == "cuda"
        return cls(logits, torch.cuda.current_stream(logits.device).record_event() if on_gpu else None)

    @property
    def ready(self) -> bool:
        return self.computed is None or self.computed.query()  # type: ignore[no-untyped-call]


class RowLocation(NamedTuple):
    """The place of a row in a block."""

    block: RowBlock
    row: int


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """One session's held rows, on the device that computed them: a snapshot that any thread may read."""

    position: int  # of the first row's token in the session
    hashes: tuple[int, ...]  # per row the running hash including the row's own token
    places: tuple[RowLocation, ...]  # per row
    batch_invariant: bool  # reduce every row by itself, so that no other row changes a bit of it
    fresh: int  # how many of the last rows are the last extend's own

    @property
    def size(self) -> int:
        return len(self.hashes)

    @property
    def blocks(self) -> set[RowBlock]:
        return {place.block for place in self.places}

    def index(self, position: int, prefix: int) -> int | None:
        row = position - self.position
        found = 0 <= row < self.size and self.hashes[row] == prefix and self.places[row].block.ready
        return row if found else None

    def slices(self, k: int, rows: Sequence[int] | None = None) -> TopKSlices:
        """The top-k slices of `rows` (all if None). k = 0 gives only the logsumexp, k > V the full row."""
        places = self._places(rows)
        with beside_forwards(places):
            return reduce_rows(gather_rows(places), k, self.batch_invariant)

    def whole(self, rows: Sequence[int] | None = None) -> NDArray[np.float32]:
        """The full logits [m, V] of `rows` (all if None), read-only."""
        places = self._places(rows)
        with beside_forwards(places):
            return to_host(gather_rows(places))

    def _places(self, rows: Sequence[int] | None) -> Sequence[RowLocation]:
        return self.places if rows is None else [self.places[row] for row in rows]

    def behind(self, earlier: DeviceRows, keep: int) -> DeviceRows:
        """These rows, and before them the last `keep` of the `earlier` ones that lie directly before them."""
        end = self.position - earlier.position
        if not 0 < end <= earlier.size:
            return self
        kept = slice(max(end - keep, 0), end)
        hashes, places = earlier.hashes[kept] + self.hashes, earlier.places[kept] + self.places
        return replace(self, position=earlier.position + kept.start, hashes=hashes, places=places)


def beside_forwards(places: Sequence[RowLocation]) -> AbstractContextManager[object]:
    """On a GPU, the stream of lookups, behind the forwards that computed these rows and beside any later one.

    The caller keeps the rows until it has the result on the host: later forwards reuse the memory of rows that nothing
    refers to, and do not wait for this stream.
    """
    device = places[0].block.logits.device
    if device.type != "cuda":
        return nullcontext()
    stream = _lookup_stream(device)
    for computed in dict.fromkeys(place.block.computed for place in places):
        if computed is not None:
            stream.wait_event(computed)
    return torch.cuda.stream(stream)


@lru_cache
def _lookup_stream(device: torch.device) -> torch.cuda.Stream:
    # The lower number goes first; forwards have 0.
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


def gather_rows(places: Sequence[RowLocation]) -> Tensor:
    """The rows [len(places), V] as one tensor: a view if one forward made them in this order."""
    block, first = places[0]
    if any(place.block is not block for place in places):
        return torch.stack([place.block.logits[place.row] for place in places])
    rows = [place.row for place in places]
    if rows == list(range(first, first + len(rows))):
        return block.logits[first : first + len(rows)]
    return block.logits[upload(rows, block.logits.device)]


@torch.inference_mode()
def values_at(places: Sequence[RowLocation], counts: Sequence[int], ids: NDArray[Any]) -> NDArray[np.float32]:
    """The logits [N] of rows at ids [N], counts[i] of them of row i; one copy to the device and one back.

    Raises IndexError for an id outside the rows.
    """
    out = np.empty(len(ids), np.float32)
    if not len(ids):
        return out
    blocks = list(dict.fromkeys(place.block for place in places))
    width, device = blocks[0].logits.shape[-1], blocks[0].logits.device
    if ids.min() < 0 or ids.max() >= width:
        raise IndexError(f"ids must lie in [0, {width})")
    flat = np.repeat(np.array([place.row for place in places], np.int64) * width, counts) + ids
    with beside_forwards(places):
        if len(blocks) == 1:
            return to_host(blocks[0].logits.take(upload(flat, device)))
        owner = np.repeat([blocks.index(place.block) for place in places], counts)
        order = np.argsort(owner, kind="stable")
        parts = torch.split(upload(flat[order], device), np.bincount(owner, minlength=len(blocks)).tolist())
        out[order] = to_host(torch.cat([block.logits.take(part) for block, part in zip(blocks, parts, strict=True)]))
    return out


@torch.inference_mode()
def reduce_rows(
    logits: Tensor, k: int, batch_invariant: bool, temperatures: Sequence[float] | None = None
) -> TopKSlices:
    """Reduce logits [R, V] to top-k slices on their device, and copy the result to the host at once.

    temperatures: [R], of each row's tempered logsumexp; None for 1.

    If batch_invariant, each logsumexp runs over a copy of its row: vectorised kernels treat the last lanes of a
    *tensor* differently, so that a row's bits would depend on the rows around it. Top-k compares and does not round.

    A GPU reduces REDUCED_ROWS rows at a time: each of their logits takes TOP_K_BYTES of its memory meanwhile.
    """
    k, heat = min(k, logits.shape[-1]), None
    if temperatures is not None and any(temperature != 1 for temperature in temperatures):
        heat = upload(temperatures, logits.device, logits.dtype)
    if logits.device.type == "cpu":
        values, ids = top_k(logits, k)
        sums, tempered = _both_sums(logits, heat, batch_invariant)
        return TopKSlices(to_host(ids.to(torch.int32)), to_host(values), to_host(sums), to_host(tempered))
    parts = []
    for first in range(0, max(len(logits), 1), REDUCED_ROWS):
        part = slice(first, first + REDUCED_ROWS)
        values, ids = top_k_on_device(logits[part], k)
        parts.append((ids, values, *_both_sums(logits[part], None if heat is None else heat[part], batch_invariant)))
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return unpack_slices(to_host(pack_slices(*columns)), len(logits), k)


def _both_sums(logits: Tensor, heat: Tensor | None, batch_invariant: bool) -> tuple[Tensor, Tensor]:
    """The logsumexp [R] of logits [R, V], and that of logits / heat; heat: [R], None for 1."""
    sums = log_sums(logits, batch_invariant)
    return sums, sums if heat is None else log_sums(logits / heat[:, None], batch_invariant)


def log_sums(logits: Tensor, batch_invariant: bool) -> Tensor:
    """The logsumexp [R] of logits [R, V]."""
    if not batch_invariant:
        return logits.logsumexp(-1)
    return torch.stack([row.clone().logsumexp(-1) for row in logits]) if len(logits) else logits.new_zeros(0)


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and ids [R, k] of the largest logits [R, V], ids ascending. Of equal logits the lowest ids count.

    `torch.topk` does not specify which of several equal logits it takes, and devices differ. So rows in which more
    logits equal the k-th value than were taken (rare in float32, common in rounded rows) are chosen again in id order.
    """
    values, ids = logits.topk(k, dim=-1)
    if k == 0:
        return values, ids
    edge = values[:, -1:]
    ambiguous = (logits == edge).sum(-1) > (values == edge).sum(-1)
    for row in ambiguous.nonzero().flatten().tolist():
        above = ids[row][values[row] > edge[row]]
        level = (logits[row] == edge[row]).nonzero().flatten()
        ids[row] = torch.cat([above, level[: k - len(above)]])
    ids = ids.sort(-1).values
    return logits.gather(-1, ids), ids


def top_k_on_device(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Equal to `top_k` for float32 logits, without waiting for the device. It is slower on the CPU.

    Each key is one integer: order-preserving 32 bits of the logit above the reversed id, so that no two keys are equal.
    """
    width = logits.shape[-1]
    bits = (logits + 0.0).view(torch.int32)  # -0.0 and 0.0 are one value
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    reversed_ids = torch.arange(width - 1, -1, -1, device=logits.device)
    best = ((ordered << 32) + reversed_ids).topk(k, dim=-1, sorted=False).values
    ids = (width - 1 - (best & 0xFFFFFFFF)).sort(-1).values
    return logits.gather(-1, ids), ids


def pack_slices(ids: Tensor, values: Tensor, sums: Tensor, tempered: Tensor) -> Tensor:
    """Pack ids and values [R, k] and two kinds of sums [R] into one int32 tensor: one copy to the host is cheaper."""
    parts = (ids.to(torch.int32), *(part.contiguous().view(torch.int32) for part in (values, sums, tempered)))
    return torch.cat([part.flatten() for part in parts])


def unpack_slices(packed: NDArray[np.int32], rows: int, k: int) -> TopKSlices:
    """The inverse of `pack_slices`, as views."""
    ids, values, sums, tempered = np.split(packed, [rows * k, 2 * rows * k, 2 * rows * k + rows])
    logits, *both = (part.view(np.float32) for part in (values, sums, tempered))
    return TopKSlices(ids.reshape(rows, k), logits.reshape(rows, k), *both)


def row_budget(width: int, device: torch.device, most: int | None = None) -> int:
    """Number of rows [width] float32 to hold on a device: `most`, or fewer to fit a share of its memory.

    most: None for MAX_ROWS.
    """
    cuda = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if cuda else host_bytes()
    return max(MIN_ROWS, min(most or MAX_ROWS, int(memory * _ROWS_SHARE) // (4 * width)))


class LogitsRowStore:
    """The held rows of all sessions, at most `budget` rows of memory. The oldest forward's rows are dropped first."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._rows: dict[int, DeviceRows] = {}
        self._sessions: dict[RowBlock, set[int]] = {}  # by forward, in their order, those that hold a row of it

    @property
    def size(self) -> int:
        """Rows in memory."""
        return sum(len(block.logits) for block in self._sessions)

    def get(self, session: int) -> DeviceRows | None:
        return self._rows.get(session)

    def drop(self, session: int) -> None:
        """Drop a session's rows, if it has any."""
        held = self._rows.pop(session, None)
        if held is not None:
            self._release(session, held.blocks)

    def make_room(self, size: int) -> None:
        """Drop the oldest forwards' rows until a forward of `size` rows fits the budget."""
        while self._sessions and self.size + size > self.budget:
            for session in tuple(next(iter(self._sessions.values()))):
                self.drop(session)

    def hold(self, session: int, rows: DeviceRows, position: int, keep: int = 0) -> None:
        """Hold the rows that the newest forward made for a session.

        keep: held rows directly before `position` that stay, if the new ones begin there.
        """
        before = self._rows.get(session)
        if before is not None and rows.position == position:
            rows = rows.behind(before, keep)
        self._rows[session] = rows
        for block in rows.blocks:
            self._sessions.setdefault(block, set()).add(session)
        if before is not None:
            self._release(session, before.blocks - rows.blocks)

    def _release(self, session: int, blocks: set[RowBlock]) -> None:
        for block in blocks:
            self._sessions[block].discard(session)
            if not self._sessions[block]:
                del self._sessions[block]

    def check(self) -> None:
        """Prove that sessions and blocks agree and the budget is kept; AssertionError if not."""
        held = {(session, block) for session, rows in self._rows.items() for block in rows.blocks}
        assert held == {(session, block) for block, sessions in self._sessions.items() for session in sessions}
        assert all(self._sessions.values()), "a forward's rows are in memory, and no session holds one"
        assert self.size <= self.budget, f"{self.size} rows are held, {self.budget} allowed"


def to_host(tensor: Tensor) -> NDArray[Any]:
    """A read-only array in the host's memory: copied to pinned memory from a GPU, a view on the CPU."""
    if tensor.device.type == "cuda":
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream(tensor.device).synchronize()
    else:
        host = tensor.cpu()
    array = host.numpy()
    array.setflags(write=False)  # on the CPU it may share memory with the held rows
    return array
