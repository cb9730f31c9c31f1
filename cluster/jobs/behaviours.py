"""Counts words and phrases that indicate behaviours of long reasoning.

Three behaviours are counted, as in the paper (arXiv 2507.12759): branching into an alternative, backtracking from a
mistake, and self-verification. The word lists are this project's own. Figures can therefore be compared between the
modes of a run, but not with those of the paper.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Self

# Words and phrases with their inflections, in lower case. No phrase is the beginning of another one in its list.
_BRANCHING = """
alternatively, alternative, alternatives, instead, perhaps, maybe, suppose, supposing, another way, another approach,
another method, another idea, another possibility, another option, different way, different approach, different method,
other approach, other approaches, on the other hand, what if, other case, other cases
"""
_BACKTRACKING = """
wait, oops, mistake, mistakes, mistaken, mistakenly, backtrack, backtracking, reconsider, reconsidering, rethink,
rethinking, reevaluate, re-evaluate, reexamine, re-examine, wrong, hold on, scratch that, go back, going back,
start over, starting over, try again, trying again, not right, isn't right, not correct, isn't correct, doesn't work
"""
_VERIFICATION = """
verify, verifies, verified, verifying, verification, check, checks, checked, checking, double-check, double-checks,
double-checked, double-checking, confirm, confirms, confirmed, confirming, recheck, rechecking, recompute, recomputing,
recalculate, recalculating, make sure, makes sure, making sure, made sure, sanity test
"""
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
_GAP = "  "  # two spaces, so that each of two adjacent phrases has a space on both sides


@dataclass(frozen=True, slots=True)
class Behaviours:
    """The number of words of a text, and the occurrences of each behaviour in it."""

    words: int = 0
    branching: int = 0
    backtracking: int = 0
    verification: int = 0

    def __add__(self, other: Self) -> Behaviours:
        return Behaviours(
            self.words + other.words,
            self.branching + other.branching,
            self.backtracking + other.backtracking,
            self.verification + other.verification,
        )

    def per_mille(self, count: int) -> float:
        """`count` per 1,000 words."""
        return 1_000 * count / self.words if self.words else 0.0


def behaviours(text: str) -> Behaviours:
    """Counts of one answer, thinking included. Case and the characters between words are ignored."""
    words = _WORD.findall(text.lower().replace("’", "'"))
    counts, spaced = Counter(words), f" {_GAP.join(words)} "
    return Behaviours(
        len(words),
        *(
            sum(counts[word] for word in singles) + sum(spaced.count(phrase) for phrase in phrases)
            for singles, phrases in (_BRANCHES, _BACKTRACKS, _VERIFIES)
        ),
    )


def _split(lemmas: str) -> tuple[list[str], list[str]]:
    """The single words of a list, and its phrases in the spacing of the searched text."""
    all_lemmas = [" ".join(lemma.split()) for lemma in lemmas.split(",")]
    phrases = [f" {lemma.replace(' ', _GAP)} " for lemma in all_lemmas if " " in lemma]
    return [lemma for lemma in all_lemmas if " " not in lemma], phrases


_BRANCHES, _BACKTRACKS, _VERIFIES = _split(_BRANCHING), _split(_BACKTRACKING), _split(_VERIFICATION)
