"""Chooses the number of drafts of a session, and drafts tokens from the session's own text.

A draft is accepted if it equals the token that its row chooses, so drafts change the speed of an answer and no token
(drafter-invariant speculative decoding with shared Gumbel noise). If each of n drafts is accepted with probability p
after those before it, a verification yields (1 - p^(n+1)) / (1 - p) tokens on average (Leviathan et al., arXiv
2211.17192, equation 1).
"""

from __future__ import annotations

from collections.abc import Sequence

_MEMORY = 0.97  # weight of the earlier drafts of a session when one more draft is recorded
_PRIOR_WEIGHT = 4.0  # the prior from other sessions counts as so many drafts
_FIRST_REST, _LONGEST_REST = 8, 128  # verifications without drafts until drafting is tried again
_NGRAMS = (4, 3, 2)  # lengths of the n-grams looked up in a text, in this order


def best_length(acceptance: float, seconds: Sequence[float]) -> int:
    """The number of drafts with the most tokens a second, the lowest of equal ones.

    seconds[n]: to draft n tokens and to verify them.
    """
    best, most = 0, 0.0
    tokens, all_accepted = 0.0, 1.0
    for drafts, each in enumerate(seconds):
        tokens, all_accepted = tokens + all_accepted, all_accepted * acceptance  # equation 1, term by term
        rate = tokens / max(each, 1e-9)
        if rate > most:
            best, most = drafts, rate
    return best


class Acceptance:
    """The acceptance rate of a session's drafts, and the rests between attempts while drafting does not pay."""

    def __init__(self, prior: float) -> None:
        self._kept, self._recorded = _PRIOR_WEIGHT * prior, _PRIOR_WEIGHT
        self._rest, self._rested = _FIRST_REST, 0

    @property
    def rate(self) -> float:
        """The estimated probability that a draft is accepted if those before it are."""
        return self._kept / self._recorded

    def record(self, drafts: int, kept: int) -> None:
        """Record a verification that accepted the first `kept` of `drafts`. Drafts after the first rejected one are
        not counted."""
        for accepted in [True] * kept + [False] * (kept < drafts):
            weight = _MEMORY if self._recorded > _PRIOR_WEIGHT else 1.0
            self._kept, self._recorded = weight * self._kept + accepted, weight * self._recorded + 1
        if kept == drafts:
            self._rest = _FIRST_REST

    def rest(self) -> bool:
        """True if this verification should go without drafts. Call it while drafting seems not to pay: it returns
        False ever more rarely, so that drafting is tried again."""
        self._rested += 1
        if self._rested < self._rest:
            return True
        self._rested, self._rest = 0, min(2 * self._rest, _LONGEST_REST)
        return False


class TextIndex:
    """Finds the tokens that followed an earlier occurrence of a growing text's last tokens (prompt lookup decoding)."""

    def __init__(self) -> None:
        self._ends: list[dict[tuple[int, ...], int]] = [{} for _ in _NGRAMS]
        self._indexed = 0

    def drafts(self, tokens: Sequence[int], count: int) -> list[int]:
        """At most `count` drafts of the next tokens; empty if the last tokens occur nowhere before."""
        self._index(tokens)
        for length, ends in zip(_NGRAMS, self._ends, strict=True):
            end = ends.get(tuple(tokens[-length:])) if len(tokens) > length else None
            if end is not None:
                return list(tokens[end : end + count])
        return []

    def _index(self, tokens: Sequence[int]) -> None:
        """Index all but the newest token. Of equal n-grams the latest counts."""
        self._indexed = min(self._indexed, len(tokens) - 1)  # the tail may have been retokenized
        for end in range(self._indexed + 1, len(tokens)):
            for length, ends in zip(_NGRAMS, self._ends, strict=True):
                if end >= length:
                    ends[tuple(tokens[end - length : end])] = end
        self._indexed = max(len(tokens) - 1, 0)
