"""What one role reads of a session: its token ids, with the running hashes that name them to a replica."""

from __future__ import annotations

from collections.abc import Sequence

from actors.decoding.hashing import prefix_hash


class Stream:
    """One role's token ids, with the running hash after each, and how many its replica holds."""

    def __init__(self, hash_seed: int, tokens: Sequence[int]) -> None:
        self._seed = hash_seed
        self.tokens: list[int] = []
        self._hashes: list[int] = []
        self.held = 0
        self.append(tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def append(self, tokens: Sequence[int]) -> None:
        """Add tokens at the end."""
        running = self.hash_before(len(self.tokens))
        for token in tokens:
            running = prefix_hash(running, token)
            self.tokens.append(token)
            self._hashes.append(running)

    def replace_tail(self, length: int, tokens: Sequence[int]) -> None:
        """Put `tokens` in the place of the last `length`."""
        keep = len(self.tokens) - length
        del self.tokens[keep:], self._hashes[keep:]
        self.held = min(self.held, keep)
        self.append(tokens)

    def hash_before(self, position: int) -> int:
        """The running hash of the tokens before `position`."""
        return self._hashes[position - 1] if position else self._seed

    def reseed(self, hash_seed: int) -> None:
        """Another model speaks for this role now: nothing is held, and its hashes start elsewhere."""
        tokens, self.tokens, self._hashes = self.tokens, [], []
        self._seed, self.held = hash_seed, 0
        self.append(tokens)
