"""One role's token ids of a session, with the running hashes by which a replica checks its KV cache."""

from __future__ import annotations

from collections.abc import Sequence

from actors.decoding.hashing import extend_hashes


class Stream:
    """One role's token ids, with the running hash after each. held: tokens that its replica has in the KV cache.

    Hashes are computed when they are asked for.
    """

    __slots__ = ("_hashes", "_seed", "held", "tokens")

    def __init__(self, hash_seed: int, tokens: Sequence[int]) -> None:
        self._seed = hash_seed
        self.tokens: list[int] = list(tokens)
        self._hashes: list[int] = []  # of the first tokens
        self.held = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def append(self, tokens: Sequence[int]) -> None:
        """Add tokens at the end."""
        self.tokens += tokens

    def replace_tail(self, length: int, tokens: Sequence[int]) -> None:
        """Replace the last `length` tokens by `tokens`."""
        keep = len(self.tokens) - length
        del self.tokens[keep:], self._hashes[keep:]
        self.held = min(self.held, keep)
        self.tokens += tokens

    def hold(self, tokens: int) -> None:
        """The replica holds the first `tokens` tokens."""
        self.held = tokens

    def lose(self, tokens: int) -> None:
        """The replica holds no more than the first `tokens` tokens."""
        self.held = min(self.held, tokens)

    def hash_before(self, position: int) -> int:
        """The running hash of the tokens before `position`."""
        if not position:
            return self._seed
        known = len(self._hashes)
        if position > known:
            self._hashes += extend_hashes(self._hashes[-1] if known else self._seed, self.tokens[known:position])
        return self._hashes[position - 1]

    def reseed(self, hash_seed: int) -> None:
        """Restart for another model of this role, which holds no token and starts its hashes from `hash_seed`."""
        self._seed, self.held = hash_seed, 0
        self._hashes = []
