"""The KV cache of one model: one flat pool of keys and values for each layer, of which each session owns one extent.

Because an extent is contiguous, a rewind only changes a length, a fork is one copy, and attention reads a session's
keys as a view. No rows are reserved for future tokens: an extent grows in place if the rows behind it are free, and
moves otherwise. Example with units of 32 rows in a pool of 128:

    reserve(A, 20)    A [0, 32)
    reserve(B, 40)    A [0, 32), B [32, 96)
    reserve(A, 33)    B [0, 64), A [64, 128): no hole has 64 rows, so the pool is compacted with A at its end
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.engine.extents import Extent, Extents


@dataclass(slots=True)
class SessionCache:
    """The extent of one session. Its first `length` rows hold keys and values."""

    extent: Extent
    length: int
    needed: int  # rows that a compaction must leave: `length`, or the length after the running step


class KVPool:
    """The extents of sessions and the tensors of all layers. Not thread-safe: one thread calls it."""

    def __init__(self, tokens: int, unit: int = 32) -> None:
        self.extents = Extents(tokens, unit)
        self.caches: dict[int, SessionCache] = {}
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys [total + 1, kv_heads, head_dim], and values

    @property
    def trash(self) -> int:
        """The extra row behind the pool, to which padding tokens are written."""
        return self.extents.total

    @property
    def total(self) -> int:
        """Rows of the pool."""
        return self.extents.total

    @property
    def used(self) -> int:
        """Rows that sessions need, each rounded up to whole units, without spare rows of their extents."""
        return sum(self.extents.round(cache.needed) for cache in self.caches.values())

    def round(self, tokens: int) -> int:
        """So many rows, rounded up to whole units."""
        return self.extents.round(tokens)

    @property
    def token_bytes(self) -> int:
        """Bytes of one row of all layers."""
        return sum(pool[0].nbytes for pools in self.layers.values() for pool in pools)

    def resize(self, tokens: int) -> None:
        """Free an empty pool's tensors; the next writes make them with so many rows."""
        assert not self.caches, "sessions would lose their rows"
        self.extents = Extents(tokens, self.extents.unit)
        self.layers.clear()

    def sessions(self) -> Collection[int]:
        """The sessions that have an extent."""
        return self.caches.keys()

    def length(self, session: int) -> int:
        """Tokens of `session` in the cache, 0 if it has none."""
        return self.caches[session].length if session in self.caches else 0

    def start(self, session: int) -> int:
        """The pool row of the session's first token."""
        return self.caches[session].extent.start

    def write(self, layer: int, index: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [T, kv_heads, head_dim] at pool rows `index` [T]; return the layer's pools.

        The first write of a layer makes its pools, with the layer's shape and on its device.
        """
        if layer not in self.layers:
            rows = self.extents.total + 1
            self.layers[layer] = keys.new_zeros(rows, *keys.shape[1:]), values.new_zeros(rows, *values.shape[1:])
        key_pool, value_pool = self.layers[layer]
        key_pool.index_copy_(0, index, keys)
        value_pool.index_copy_(0, index, values)
        return key_pool, value_pool

    def reserve(self, session: int, position: int, end: int) -> bool:
        """Make the session's extent hold `end` rows, moving extents if needed; False if there is no room.

        position: the first row that will be written; of no account here, since no extent is shared.
        """
        cache = self.caches.get(session)
        if cache is None:
            return self._reserve_new(session, end)
        if end > cache.extent.capacity and not self._grow(session, cache, end):
            return False
        cache.needed = max(cache.length, end)
        return True

    def room_for(self, session: int, position: int, without: Iterable[int] = ()) -> int:
        """Rows that `session` could have, its own included, after `without` were dropped and the pool compacted.

        position: as in `reserve`.
        """
        others = (self.caches[other].needed for other in self.caches.keys() - {session, *without})
        return self.extents.total - sum(map(self.extents.round, others))

    def commit(self, session: int, length: int) -> None:
        """Set the session's length to `length` tokens, after a forward or a rewind."""
        cache = self.caches[session]
        assert 0 < length <= cache.extent.capacity
        cache.length = cache.needed = length

    def fork(self, source: int, session: int, length: int) -> bool:
        """Copy the first `length` tokens of `source` to the new `session`; False if there is no room."""
        assert 0 < length <= self.length(source)
        assert session not in self.caches
        if not self.reserve(session, 0, length):
            return False
        self._copy(self.start(source), self.start(session), length)
        self.commit(session, length)
        return True

    def drop(self, session: int) -> None:
        """Free the session's rows, if it has any."""
        cache = self.caches.pop(session, None)
        if cache is not None:
            self.extents.release(cache.extent)

    def check(self) -> None:
        """Prove that every row is free or owned once and that caches are consistent; AssertionError if not."""
        self.extents.check(cache.extent for cache in self.caches.values())
        for session, cache in self.caches.items():
            assert 0 < cache.length == cache.needed <= cache.extent.capacity, f"session {session}: {cache}"

    def _reserve_new(self, session: int, tokens: int) -> bool:
        extent = self.extents.allocate(tokens)
        if extent is None and self.room_for(session, 0) >= self.extents.round(tokens):
            self._compact(self.caches)
            extent = self.extents.allocate(tokens)
        if extent is None:
            return False
        self.caches[session] = SessionCache(extent, length=0, needed=tokens)
        return True

    def _grow(self, session: int, cache: SessionCache, tokens: int) -> bool:
        grown = self.extents.grow(cache.extent, tokens)
        if grown is not None:
            cache.extent = grown
            return True
        # By doubling, the rows copied for a growing session stay linear in its length.
        moved = self.extents.allocate(max(tokens, 2 * cache.extent.capacity)) or self.extents.allocate(tokens)
        if moved is not None:
            self._copy(cache.extent.start, moved.start, cache.length)
            self.extents.release(cache.extent)
            cache.extent = moved
            return True
        if self.room_for(session, 0) < self.extents.round(tokens):
            return False
        self._compact([*(other for other in self.caches if other != session), session])
        grown = self.extents.grow(cache.extent, tokens)
        assert grown is not None, "a compacted pool has all its free rows behind the last extent"
        cache.extent = grown
        return True

    @torch.inference_mode()
    def _copy(self, source: int, target: int, length: int) -> None:
        for pools in self.layers.values():
            for pool in pools:
                pool[target : target + length] = pool[source : source + length]

    def _compact(self, order: Iterable[int]) -> None:
        """Move all extents to the front of the pool, in `order`, without spare rows."""
        sources, targets, cursor = [], [], 0
        for session in order:
            cache = self.caches[session]
            sources.append(torch.arange(cache.extent.start, cache.extent.start + cache.length))
            targets.append(torch.arange(cursor, cursor + cache.length))
            cache.extent = Extent(cursor, self.extents.round(cache.needed))
            cursor = cache.extent.end
        self.extents.restart(cursor)
        if sources:
            self._move(torch.cat(sources), torch.cat(targets))

    @torch.inference_mode()
    def _move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy pool rows through a temporary tensor of one layer: source and target rows may overlap."""
        for pools in self.layers.values():
            for pool in pools:
                pool[targets.to(pool.device)] = pool[sources.to(pool.device)]
