"""The sessions in the KV cache, and the admission of their extends to a step.

Admission goes by age: an older session may evict younger ones, so the oldest session always progresses.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from actors.decoding.hashing import extend_hashes
from actors.engine.interface import BLOCK, Extend, Full, KVMiss
from actors.engine.runner import SessionCache


@dataclass(slots=True)
class Session:
    """A session's data besides its keys and values."""

    age: int
    hashes: array[int]  # 64-bit running hash after 0, 1, 2 ... tokens
    tokens: array[int]

    @property
    def length(self) -> int:
        return len(self.hashes) - 1


def seniority(extend: Extend) -> tuple[int, int]:
    """Sort key of extends, oldest first. Equal ages are ordered by session, so that one session always progresses."""
    return extend.age, extend.session


class SessionTable:
    """The sessions with cached tokens. Not thread-safe: one thread calls it."""

    def __init__(self, cache: SessionCache, seed: int) -> None:
        self.cache, self.seed = cache, seed
        self.sessions: dict[int, Session] = {}
        self._holders: dict[int, set[int]] = {}  # by hash after a whole block the sessions that hold the block

    def admit(self, batch: Sequence[Extend]) -> dict[int, KVMiss | Full | None]:
        """Reserve room for every extend that can run now. Returns by session None if it can, else the refusal.

        Extends are served oldest first, so that admission depends on ages and not on the order of the batch. A session
        that is evicted for an older one of the same step gets `Full`.
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
        """Update length and hashes after the forward wrote this extend's keys and values."""
        session = self.sessions.setdefault(extend.session, Session(extend.age, array("Q", [self.seed]), array("i")))
        session.age = extend.age
        self._remove_holder(extend.session, extend.position)
        del session.hashes[extend.position + 1 :]
        del session.tokens[extend.position :]
        session.hashes.extend(extend_hashes(extend.prefix, extend.tokens))
        session.tokens.extend(extend.tokens)
        self._add_holder(extend.session, extend.position)
        self.cache.commit(extend.session, extend.end)

    def evict(self, session: int) -> None:
        """Drop the cache of a session: its next extend gets `KVMiss(0)`."""
        if session in self.sessions:
            self._remove_holder(session, 0)
            del self.sessions[session]
        self.cache.drop(session)

    def shared(self, blocks: Sequence[int]) -> int:
        """Number of leading blocks that some session holds. blocks: the running hash after each."""
        # A session that holds a block holds all blocks before it.
        return bisect_left(blocks, True, key=lambda block: block not in self._holders)

    def fork(self, session: int, tokens: Sequence[int], blocks: Sequence[int], age: int) -> bool:
        """Start `session` with `tokens`, whole blocks of another one. False if none holds them or without room."""
        holders = self._holders.get(blocks[-1], set())
        source = session if session in holders else next(iter(holders), None)
        length = len(tokens)
        if source is None or self.sessions[source].tokens[:length] != array("i", tokens):
            return False
        if source != session:
            self.evict(session)
            if not self.cache.fork(source, session, length):
                return False
            origin = self.sessions[source]
            self.sessions[session] = Session(age, origin.hashes[: length + 1], origin.tokens[:length])
            self._add_holder(session, 0)
        return True

    def check(self) -> None:
        """Prove that table and cache agree; AssertionError if not."""
        self.cache.check()
        assert self.sessions.keys() == set(self.cache.sessions())
        for key, session in self.sessions.items():
            assert session.length == self.cache.length(key), f"session {key}: {session.length} hashes"
            assert session.hashes[0] == self.seed
            assert list(session.hashes[1:]) == extend_hashes(self.seed, session.tokens)
        held = {(block, key) for key, session in self.sessions.items() for block in session.hashes[BLOCK::BLOCK]}
        assert held == {(block, key) for block, keys in self._holders.items() for key in keys}
        assert all(self._holders.values())

    def _add_holder(self, key: int, position: int) -> None:
        """Add a session as holder of its blocks behind the first `position` tokens."""
        for block in self.sessions[key].hashes[_block_after(position) :: BLOCK]:
            self._holders.setdefault(block, set()).add(key)

    def _remove_holder(self, key: int, position: int) -> None:
        """Remove a session as holder of its blocks behind the first `position` tokens."""
        for block in self.sessions[key].hashes[_block_after(position) :: BLOCK]:
            self._holders[block].remove(key)
            if not self._holders[block]:
                del self._holders[block]

    def _match(self, extend: Extend) -> KVMiss | None:
        """The miss of an extend whose earlier tokens are not those in the cache; None if they are."""
        session = self.sessions.get(extend.session)
        hashes: Sequence[int] = session.hashes if session is not None else [self.seed]
        if extend.position >= len(hashes):
            return KVMiss(extend.session, len(hashes) - 1)
        if hashes[extend.position] != extend.prefix:
            return KVMiss(extend.session, 0)
        return None

    def _reserve(self, extend: Extend, waiting: Collection[int], answers: dict[int, KVMiss | Full | None]) -> bool:
        """Make room, if needed by evicting younger sessions. No session is evicted if that is not enough."""
        if self.cache.reserve(extend.session, extend.position, extend.end):
            return True
        needed = self.cache.round(extend.end)
        victims: list[int] = []
        for victim in self._evictable(extend, waiting, answers):
            if self.cache.room_for(extend.session, extend.position, victims) >= needed:
                break
            victims.append(victim)
        if self.cache.room_for(extend.session, extend.position, victims) < needed:
            return False
        for victim in victims:
            self.evict(victim)
            if victim in waiting:
                answers[victim] = Full(victim)
        reserved = self.cache.reserve(extend.session, extend.position, extend.end)
        assert reserved, "the room after a compaction can be reserved"
        return True

    def _evictable(self, extend: Extend, waiting: Collection[int], answers: Collection[int]) -> list[int]:
        """Sessions that an extend may evict: youngest first, those outside of this step before those in it."""
        younger = [
            (key not in waiting, session.age, key)
            for key, session in self.sessions.items()
            if (session.age, key) > seniority(extend) and key not in answers
        ]
        return [key for _, _, key in sorted(younger, reverse=True)]


def _block_after(position: int) -> int:
    """End of the first whole block that reaches beyond the first `position` tokens."""
    return (position // BLOCK + 1) * BLOCK
