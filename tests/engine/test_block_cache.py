"""Blocks of sessions, held against a memory that copies and writes as a runner does."""

from __future__ import annotations

import random

import pytest

from actors.engine.block_cache import BlockCache

SIZE = 4


class Memory:
    """The tokens in each block, written through a cache's tables."""

    def __init__(self, blocks: int) -> None:
        self.cache = BlockCache(blocks, SIZE)
        self._tokens = [[-1] * SIZE for _ in range(blocks)]

    def write(self, session: int, position: int, tokens: list[int]) -> bool:
        """Reserve, make the copies, write and commit, as a step does."""
        if not self.cache.reserve(session, position, position + len(tokens)):
            return False
        self.copy()
        blocks = self.cache.blocks(session)
        for at, token in enumerate(tokens, start=position):
            self._tokens[blocks[at // SIZE]][at % SIZE] = token
        self.cache.commit(session, position + len(tokens))
        return True

    def copy(self) -> None:
        """Make the copies that are due, all at once."""
        read = [(target, list(self._tokens[source])) for source, target in self.cache.copies()]
        self.cache.copied()
        for target, tokens in read:
            self._tokens[target] = tokens

    def read(self, session: int) -> list[int]:
        self.copy()
        blocks = self.cache.blocks(session)
        return [self._tokens[blocks[at // SIZE]][at % SIZE] for at in range(self.cache.length(session))]


def test_a_fork_shares_whole_blocks_and_a_write_separates_them() -> None:
    memory = Memory(5)
    assert memory.write(1, 0, list(range(10)))
    assert memory.cache.fork(1, 2, 8)
    assert memory.cache.blocks(2) == memory.cache.blocks(1)[:2]
    assert memory.cache.used == 12
    assert memory.write(2, 6, [60])
    assert memory.cache.blocks(2)[0] == memory.cache.blocks(1)[0]
    assert memory.cache.blocks(2)[1] != memory.cache.blocks(1)[1]
    assert memory.read(1) == list(range(10))
    assert memory.read(2) == [0, 1, 2, 3, 4, 5, 60]
    memory.cache.check()


def test_a_fork_that_ends_within_a_block_copies_it_even_if_its_source_is_dropped_first() -> None:
    memory = Memory(5)
    assert memory.write(1, 0, list(range(7)))
    assert memory.cache.fork(1, 2, 6)
    assert memory.cache.fork(2, 3, 5)  # of a copy that is not made yet
    memory.cache.drop(1)
    memory.cache.drop(2)
    assert memory.write(4, 0, [9] * 8)  # into the freed blocks
    assert memory.read(3) == [0, 1, 2, 3, 4]
    memory.cache.check()


def test_a_write_at_the_beginning_of_a_shared_block_copies_nothing() -> None:
    memory = Memory(4)
    assert memory.write(1, 0, list(range(8)))
    assert memory.cache.fork(1, 2, 8)
    assert memory.cache.reserve(2, 4, 8)
    assert memory.cache.copies() == []


def test_without_room_nothing_changes() -> None:
    memory = Memory(3)
    assert memory.write(1, 0, list(range(8)))
    assert memory.cache.fork(1, 2, 8)
    assert memory.cache.room_for(2, 6) == 8
    assert not memory.cache.reserve(2, 6, 9)
    assert memory.cache.room_for(2, 6, without=[1]) == 12
    assert memory.read(1) == memory.read(2) == list(range(8))
    memory.cache.check()


@pytest.mark.parametrize("seed", range(4))
def test_content_survives_any_history(seed: int) -> None:
    draw, memory, mirror = random.Random(seed), Memory(24), dict[int, list[int]]()
    cache = memory.cache
    for step in range(1500):
        session, kind = draw.randrange(8), draw.random()
        if kind < 0.1:
            cache.drop(session)
            mirror.pop(session, None)
        elif kind < 0.3 and mirror and session not in mirror:
            source = draw.choice(list(mirror))
            length = draw.randint(1, len(mirror[source]))
            if cache.fork(source, session, length):
                mirror[session] = mirror[source][:length]
        else:
            position = draw.randint(0, len(mirror.get(session, [])))
            new = [step] * draw.randint(1, 20)
            others = draw.sample(sorted(mirror.keys() - {session}), draw.randint(0, len(mirror.keys() - {session})))
            if cache.room_for(session, position, others) >= position + len(new):
                for other in others:
                    cache.drop(other)
                    del mirror[other]
                assert memory.write(session, position, new)
                mirror[session] = mirror.get(session, [])[:position] + new
            else:
                assert not cache.reserve(session, position, position + len(new))
        cache.check()
        assert {key: memory.read(key) for key in mirror} == mirror


def test_a_block_that_two_sessions_claim_is_noticed() -> None:
    memory = Memory(4)
    assert memory.write(1, 0, [1])
    assert memory.write(2, 0, [2])
    memory.cache.blocks(2)[0] = memory.cache.blocks(1)[0]
    with pytest.raises(AssertionError):
        memory.cache.check()
