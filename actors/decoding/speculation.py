"""How far to guess ahead, and guesses from a session's own text.

A draft is kept while it equals the token that its row chooses, so drafts change the speed of an answer and nothing else
(drafter-invariant speculative decoding with shared Gumbel noise). Of n drafts, each kept with probability p as long as
those before it were, a check yields (1 - p^(n+1)) / (1 - p) tokens on average (Leviathan et al., arXiv 2211.17192,
equation 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_MEMORY = 0.97  # weight of what is remembered of a session when one more draft is judged
_PRIOR_WEIGHT = 4.0  # drafts that the expectation from other sessions counts for
_FIRST_REST, _LONGEST_REST = 8, 128  # checks without drafts until one is tried again
_NGRAMS = (4, 3, 2)  # lengths of what is looked up in a text, the most telling first


def expected_tokens(acceptance: float, drafts: int) -> float:
    """Tokens that a check of `drafts` drafts yields on average, its own included."""
    if acceptance >= 1:
        return drafts + 1.0
    return float((1 - acceptance ** (drafts + 1)) / (1 - acceptance))


def best_length(acceptance: float, most: int, seconds: Callable[[int], float]) -> int:
    """The number of drafts, 0 to `most`, that yields the most tokens a second. seconds: of drafting and checking n."""
    return max(range(most + 1), key=lambda n: (expected_tokens(acceptance, n) / max(seconds(n), 1e-9), -n))


class Acceptance:
    """How often a session's drafts are kept, and when to try again after drafting did not pay."""

    def __init__(self, prior: float) -> None:
        self._kept, self._judged = _PRIOR_WEIGHT * prior, _PRIOR_WEIGHT
        self._rest, self._rested = _FIRST_REST, 0

    @property
    def rate(self) -> float:
        """The probability that a draft is kept if those before it are."""
        return self._kept / self._judged

    def judge(self, drafts: int, kept: int) -> None:
        """Of a check's drafts the first `kept` were kept; those after the first rejected one say nothing."""
        for accepted in [True] * kept + [False] * (kept < drafts):
            weight = _MEMORY if self._judged > _PRIOR_WEIGHT else 1.0
            self._kept, self._judged = weight * self._kept + accepted, weight * self._judged + 1
        if kept == drafts:
            self._rest = _FIRST_REST

    def rest(self) -> bool:
        """Drafting does not seem to pay: whether to leave it for this check. Tried again ever more rarely."""
        self._rested += 1
        if self._rested < self._rest:
            return True
        self._rested, self._rest = 0, min(2 * self._rest, _LONGEST_REST)
        return False


class TextIndex:
    """Finds what followed the newest tokens of a growing text where they stood before (prompt lookup decoding)."""

    def __init__(self) -> None:
        self._ends: list[dict[tuple[int, ...], int]] = [{} for _ in _NGRAMS]
        self._indexed = 0

    def guesses(self, tokens: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens that may come next; empty if the text has said nothing like it before."""
        self._index(tokens)
        for length, ends in zip(_NGRAMS, self._ends, strict=True):
            end = ends.get(tuple(tokens[-length:])) if len(tokens) > length else None
            if end is not None:
                return list(tokens[end : end + count])
        return []

    def _index(self, tokens: Sequence[int]) -> None:
        """Take in all but the newest token; later places stand above earlier ones."""
        self._indexed = min(self._indexed, len(tokens) - 1)  # the tail may have been respelled
        for end in range(self._indexed + 1, len(tokens)):
            for length, ends in zip(_NGRAMS, self._ends, strict=True):
                if end >= length:
                    ends[tuple(tokens[end - length : end])] = end
        self._indexed = max(len(tokens) - 1, 0)
