"""The interface of what computes an engine's steps: a model with its KV cache."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from actors.engine.interface import Extend


class SessionCache(Protocol):
    """The keys and values of sessions, counted in tokens. One thread calls it."""

    @property
    def total(self) -> int:
        """Tokens of all sessions together."""

    @property
    def used(self) -> int:
        """Tokens that sessions need, each rounded up to the allocator's unit."""

    def round(self, tokens: int) -> int:
        """So many tokens, rounded up to the allocator's unit."""

    def sessions(self) -> Collection[int]:
        """The sessions that have room."""

    def length(self, session: int) -> int:
        """Tokens that a session holds, 0 if it has no room."""

    def reserve(self, session: int, position: int, end: int) -> bool:
        """Make room for a session's tokens up to `end`, of which those from `position` on will be written.

        Returns False, without a change, if there is none.
        """

    def room_for(self, session: int, position: int, without: Iterable[int] = ()) -> int:
        """The largest `end` that `reserve` would grant once the sessions in `without` were dropped."""

    def commit(self, session: int, length: int) -> None:
        """A session holds so many tokens from now on, after a forward or a rewind."""

    def fork(self, source: int, session: int, length: int) -> bool:
        """Let a new session hold the first `length` tokens of `source`; False if there is no room."""

    def drop(self, session: int) -> None:
        """Free the room of a session, if it has any."""

    def check(self) -> None:
        """Prove that the accounts are exact; AssertionError if not."""


class Runner(Protocol):
    """One causal language model on its device."""

    @property
    def cache(self) -> SessionCache:
        """The keys and values of its sessions."""

    width: int  # logits in a row
    vocabulary: int  # ids that the model has embeddings for
    digest: int  # of the weights, from which the running hashes of sessions start
    batch_invariant: bool
    positions: int | None  # tokens that a session may have beside its room in the cache; None: any number
    dtype: torch.dtype
    device: torch.device
    devices: Sequence[str]  # names of the hardware that it computes on

    def forward(self, admitted: Sequence[Extend]) -> Tensor:
        """Compute extends of different sessions, for which the cache has room reserved.

        Returns the logits [R, V] float32 of their rows, one extend after another, then those of padding.
        """

    def padded(self, count: int) -> int:
        """Rows of a forward that was asked for `count` rows."""

    def plain_logits(self, tokens: Sequence[int]) -> list[Tensor]:
        """Logits [n, V] float32 of one sequence, computed at once and without the cache, in every way there is.

        The first are what rows should be. The distance of the others from them is rounding.
        """

    def non_finite_weight(self) -> str | None:
        """Name of the first weight that holds NaN or infinite values; None if there is none."""
