"""Who holds what in the cache, and who may enter a step.

Admission goes by age: an older session may evict younger ones, so the oldest always progresses.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from actors.decoding.hashing import extend_hashes
from actors.engine.interface import BLOCK, Extend, Full, KVMiss
from actors.engine.kv_pool import KVPool


@dataclass(slots=True)
class Session:
    """What the engine knows of a session besides its keys and values."""

    age: int
    hashes: array[int]  # 64-bit running hash after 0, 1, 2 ... tokens
    tokens: array[int]

    @property
    def length(self) -> int:
        return len(self.hashes) - 1


def seniority(extend: Extend) -> tuple[int, int]:
    """Sorts extends oldest first; equal ages are ordered by session, so that somebody always progresses."""
    return extend.age, extend.session


class SessionTable:
    """Sessions and their part of a pool. Not thread-safe: one owner calls it."""

    def __init__(self, pool: KVPool, seed: int) -> None:
        self.pool, self.seed = pool, seed
        self.sessions: dict[int, Session] = {}
        self._holders: dict[int, set[int]] = {}  # by the hash after each whole block: the sessions that hold it

    def admit(self, batch: Sequence[Extend]) -> dict[int, KVMiss | Full | None]:
        """Reserve room for every extend that can run now: per session None if it can, else why not.

        Oldest first, so that who is admitted depends on ages alone, not on the order of the batch. A session that is
        evicted for an older one of the same step answers `Full`.
        """
        answers: dict[int, KVMiss | Full | None] = {}
        waiting = {extend.session for extend in batch}
        for extend in sorted(batch, key=seniority):
            waiting.discard(extend.session)
            if extend.session in answers:
                continue
            answers[extend.session] = miss = self._match(extend)
            if miss is None and not self._reserve(extend, waiting, answers):
                answers[extend.session] = Full(extend.session)
        return answers

    def commit(self, extend: Extend) -> None:
        """The forward wrote this extend's keys and values: lengths and hashes follow."""
        session = self.sessions.setdefault(extend.session, Session(extend.age, array("Q", [self.seed]), array("i")))
        session.age = extend.age
        self._forget(extend.session, extend.position)
        del session.hashes[extend.position + 1 :]
        del session.tokens[extend.position :]
        session.hashes.extend(extend_hashes(extend.prefix, extend.tokens))
        session.tokens.extend(extend.tokens)
        self._note(extend.session, extend.position)
        self.pool.commit(extend.session, extend.end)

    def evict(self, session: int) -> None:
        """Drop the cache of a session; its next extend answers `KVMiss(0)`."""
        if session in self.sessions:
            self._forget(session, 0)
            del self.sessions[session]
        self.pool.drop(session)

    def shared(self, blocks: Sequence[int]) -> int:
        """How many of the first blocks, named by the running hash after each, a session holds."""
        return bisect_left(blocks, True, key=lambda block: block not in self._holders)  # who holds one holds all before

    def fork(self, session: int, tokens: Sequence[int], blocks: Sequence[int], age: int) -> bool:
        """Begin `session` with `tokens`, whole blocks that a session holds; False without such a one or room."""
        holders = self._holders.get(blocks[-1], set())
        source = session if session in holders else next(iter(holders), None)
        length = len(tokens)
        if source is None or self.sessions[source].tokens[:length] != array("i", tokens):
            return False
        if source != session:
            self.evict(session)
            if not self.pool.fork(source, session, length):
                return False
            origin = self.sessions[source]
            self.sessions[session] = Session(age, origin.hashes[: length + 1], origin.tokens[:length])
            self._note(session, 0)
        return True

    def check(self) -> None:
        """Prove that table and pool agree; AssertionError if not."""
        self.pool.check()
        assert self.sessions.keys() == self.pool.caches.keys()
        for key, session in self.sessions.items():
            assert session.length == self.pool.length(key), f"session {key}: {session.length} hashes"
            assert session.hashes[0] == self.seed
            assert list(session.hashes[1:]) == extend_hashes(self.seed, session.tokens)
        held = {(block, key) for key, session in self.sessions.items() for block in session.hashes[BLOCK::BLOCK]}
        assert held == {(block, key) for block, keys in self._holders.items() for key in keys}
        assert all(self._holders.values())

    def _note(self, key: int, position: int) -> None:
        """A session holds more tokens than the first `position`."""
        for block in self.sessions[key].hashes[_block_after(position) :: BLOCK]:
            self._holders.setdefault(block, set()).add(key)

    def _forget(self, key: int, position: int) -> None:
        """A session goes back to its first `position` tokens."""
        for block in self.sessions[key].hashes[_block_after(position) :: BLOCK]:
            self._holders[block].remove(key)
            if not self._holders[block]:
                del self._holders[block]

    def _match(self, extend: Extend) -> KVMiss | None:
        """A miss unless what is held before `position` is what the sender means."""
        session = self.sessions.get(extend.session)
        hashes: Sequence[int] = session.hashes if session is not None else [self.seed]
        if extend.position >= len(hashes):
            return KVMiss(extend.session, len(hashes) - 1)
        if hashes[extend.position] != extend.prefix:
            return KVMiss(extend.session, 0)
        return None

    def _reserve(self, extend: Extend, waiting: Collection[int], answers: dict[int, KVMiss | Full | None]) -> bool:
        """Make room, by evicting younger sessions if need be; nobody is evicted when that would not be enough."""
        if self.pool.reserve(extend.session, extend.end):
            return True
        needed = self.pool.extents.round(extend.end)
        victims: list[int] = []
        for victim in self._younger(extend, waiting, answers):
            if self.pool.room_for(extend.session, victims) >= needed:
                break
            victims.append(victim)
        if self.pool.room_for(extend.session, victims) < needed:
            return False
        for victim in victims:
            self.evict(victim)
            if victim in waiting:
                answers[victim] = Full(victim)
        reserved = self.pool.reserve(extend.session, extend.end)
        assert reserved, "room that a compaction leaves can be reserved"
        return True

    def _younger(self, extend: Extend, waiting: Collection[int], answers: Collection[int]) -> list[int]:
        """Whom the requester may evict: youngest first, those outside of this step before those that wait in it."""
        younger = [
            (key not in waiting, session.age, key)
            for key, session in self.sessions.items()
            if (session.age, key) > seniority(extend) and key not in answers
        ]
        return [key for _, _, key in sorted(younger, reverse=True)]


def _block_after(position: int) -> int:
    """Where the first whole block ends that is not within the first `position` tokens."""
    return (position // BLOCK + 1) * BLOCK
