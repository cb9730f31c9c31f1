"""One role's token ids of a session, with the running hashes by which a replica checks its KV cache."""

from __future__ import annotations

from collections.abc import Sequence

from actors.decoding.hashing import extend_hashes, prefix_hash


class Stream:
    """One role's token ids with the running hash after each. held: tokens that its replica has in the KV cache."""

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
        if len(tokens) == 1:
            self._hashes.append(prefix_hash(self.hash_before(len(self.tokens)), tokens[0]))
        else:
            self._hashes += extend_hashes(self.hash_before(len(self.tokens)), tokens)
        self.tokens += tokens

    def replace_tail(self, length: int, tokens: Sequence[int]) -> None:
        """Replace the last `length` tokens by `tokens`."""
        keep = len(self.tokens) - length
        del self.tokens[keep:], self._hashes[keep:]
        self.held = min(self.held, keep)
        self.append(tokens)

    def hold(self, tokens: int) -> None:
        """The replica holds the first `tokens` tokens."""
        self.held = tokens

    def lose(self, tokens: int) -> None:
        """The replica holds no more than the first `tokens` tokens."""
        self.held = min(self.held, tokens)

    def hash_before(self, position: int) -> int:
        """The running hash of the tokens before `position`."""
        return self._hashes[position - 1] if position else self._seed

    def reseed(self, hash_seed: int) -> None:
        """Restart for another model of this role, which holds no token and starts its hashes from `hash_seed`."""
        tokens, self.tokens, self._hashes = self.tokens, [], []
        self._seed, self.held = hash_seed, 0
        self.append(tokens)
