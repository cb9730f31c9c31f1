"""Integer hashes of token prefixes and seeds.

They are pure integer arithmetic, so every machine computes the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix64(x: int) -> int:
    """The splitmix64 finaliser: a bijection of 64-bit integers in which every input bit affects every output bit."""
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def prefix_hash(previous: int, token: int) -> int:
    """The 64-bit running hash of a token sequence after one more token. It starts from the model's hash seed."""
    x = (previous + (token + 1) * _GOLDEN) & MASK  # `mix64`, without the call
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def extend_hashes(start: int, tokens: Sequence[int]) -> list[int]:
    """The running hash after each of `tokens`, in order."""
    hashes = []
    for token in tokens:
        start = prefix_hash(start, token)
        hashes.append(start)
    return hashes


def derive_seed(seed: int, *parts: int) -> int:
    """A 64-bit seed from another one and integers, such as (request seed, choice) or (run seed, question, sample)."""
    for part in parts:
        seed = prefix_hash(seed, part)
    return mix64(seed)
