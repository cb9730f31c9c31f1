"""Which blocks of a paged KV cache hold the tokens of each session. It counts; the keys and values are elsewhere.

Sessions share the blocks of what was forked. An extend that writes into a shared block gets a block of its own, and the
tokens before its position are copied there. Example with blocks of 4 tokens, of which there are 5:

    reserve(A, 0, 10); commit(A, 10)   A [0, 1, 2]
    fork(A, B, 8)                      B [0, 1]       shared with A; nothing is copied
    reserve(B, 6, 7); commit(B, 7)     B [0, 3]       copies: 1 -> 3, whose tokens 4 and 5 stay
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(slots=True)
class _Table:
    """The blocks of one session, of which the last one may be partly used. length: its tokens."""

    blocks: list[int]
    length: int


class BlockCache:
    """Implements `actors.engine.runner.SessionCache` over `count` blocks of `size` tokens. One thread calls it."""

    def __init__(self, count: int, size: int) -> None:
        self.size = size
        self._tables: dict[int, _Table] = {}
        self._holders = [0] * count  # tables that have the block
        self._free = list(reversed(range(count)))
        self._copies: dict[int, int] = {}  # by block, the one that it is a copy of; to be made before the next forward

    @property
    def total(self) -> int:
        """Tokens of all blocks."""
        return len(self._holders) * self.size

    @property
    def used(self) -> int:
        """Tokens of the blocks that sessions have."""
        return self.total - len(self._free) * self.size

    def round(self, tokens: int) -> int:
        """So many tokens, rounded up to whole blocks."""
        return -(-tokens // self.size) * self.size

    def sessions(self) -> Collection[int]:
        """The sessions that have blocks."""
        return self._tables.keys()

    def length(self, session: int) -> int:
        """Tokens that a session holds, 0 if it has none."""
        return self._tables[session].length if session in self._tables else 0

    def blocks(self, session: int) -> list[int]:
        """The session's blocks, in the order of its tokens."""
        return self._tables[session].blocks

    def copies(self) -> list[tuple[int, int]]:
        """Pairs of a block and the one that it must be copied to, all at once, before the next forward."""
        return [(source, target) for target, source in self._copies.items()]

    def copied(self) -> None:
        """The copies were made."""
        self._copies.clear()

    def reserve(self, session: int, position: int, end: int) -> bool:
        """Give the session blocks for `end` tokens, its own from `position` on; False, without a change, without room.

        Blocks behind `end`, of a session that goes back, are given up.
        """
        table = self._tables.get(session) or _Table([], 0)
        count = self.round(end) // self.size
        kept, behind = table.blocks[:count], table.blocks[count:]
        shared = [at for at in range(position // self.size, len(kept)) if self._holders[kept[at]] > 1]
        needed = len(shared) + count - len(kept)
        if needed > len(self._free) + sum(self._holders[block] == 1 for block in behind):
            return False
        self._give_up(behind)
        for at in shared:
            old, kept[at] = kept[at], self._take()
            self._holders[old] -= 1
            if at * self.size < position:
                self._copies[kept[at]] = self._copies.get(old, old)
        table.blocks = kept + [self._take() for _ in range(count - len(kept))]
        self._tables[session] = table
        return True

    def room_for(self, session: int, position: int, without: Iterable[int] = ()) -> int:
        """The largest `end` that `reserve` would grant once the sessions in `without` were dropped."""
        others = self._tables.keys() - {session, *without}
        taken = {block for other in others for block in self._tables[other].blocks}
        own = self._tables[session].blocks[: position // self.size] if session in self._tables else []
        return (len(self._holders) - len(taken) + sum(block in taken for block in own)) * self.size

    def commit(self, session: int, length: int) -> None:
        """The session holds so many tokens from now on; blocks behind them are given up."""
        table = self._tables[session]
        assert 0 < length <= len(table.blocks) * self.size
        table.length = length
        count = self.round(length) // self.size
        self._give_up(table.blocks[count:])
        del table.blocks[count:]

    def fork(self, source: int, session: int, length: int) -> bool:
        """Let a new session share the first `length` tokens of `source`; False if the last block's part has no room."""
        assert 0 < length <= self.length(source)
        assert session not in self._tables
        whole, rest = divmod(length, self.size)
        if rest and not self._free:
            return False
        blocks = self._tables[source].blocks[:whole]
        for block in blocks:
            self._holders[block] += 1
        if rest:
            origin = self._tables[source].blocks[whole]
            blocks.append(self._take())
            self._copies[blocks[-1]] = self._copies.get(origin, origin)
        self._tables[session] = _Table(blocks, length)
        return True

    def drop(self, session: int) -> None:
        """Give up the session's blocks, if it has any."""
        table = self._tables.pop(session, None)
        if table is not None:
            self._give_up(table.blocks)

    def check(self) -> None:
        """Prove that every block is free or held, and that no copy is lost; AssertionError if not."""
        holders = [0] * len(self._holders)
        for session, table in self._tables.items():
            assert 0 < table.length, f"session {session} holds no tokens"
            assert len(table.blocks) * self.size == self.round(table.length), f"session {session}: {table}"
            for block in table.blocks:
                holders[block] += 1
        assert holders == self._holders
        assert sorted(self._free) == [block for block, count in enumerate(holders) if not count]
        assert all(holders[target] for target in self._copies), "a copy into a free block"

    def _take(self) -> int:
        block = self._free.pop()
        self._holders[block] = 1
        return block

    def _give_up(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._holders[block] -= 1
            if not self._holders[block]:
                self._copies.pop(block, None)
                self._free.append(block)
