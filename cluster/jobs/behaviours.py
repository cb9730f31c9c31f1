"""How often a text does what long reasoning does: counts of words that show it.

Three behaviours are counted, as the paper does (arXiv 2507.12759): branching into another way, backtracking from a
mistake, and verifying oneself. It does not print its lists of lemmas. These are this project's, so that modes of one
run can be compared, not figures of two papers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

# Lemmas with their inflections. Longer ones first where one begins another.
_BRANCHING = r"""
alternatively alternatives? another\ (?:way|approach|method|idea|possibility|option) instead perhaps maybe
different\ (?:way|approach|method) on\ the\ other\ hand suppos(?:e|es|ed|ing) what\ if other\ cases?
"""
_BACKTRACKING = r"""
wait hold\ on scratch\ that oops mistakes? mistaken(?:ly)? (?:go|going|goes|went)\ back start(?:ing)?\ over
backtrack(?:s|ed|ing)? reconsider(?:s|ed|ing)? rethink(?:s|ing)? (?:re-?evaluat|re-?examin)(?:e|es|ed|ing)
try(?:ing)?\ again (?:not|isn't|wasn't)\ (?:right|correct) wrong
"""
_VERIFICATION = r"""
verif(?:y|ies|ied|ying|ication) (?:double-?\ ?)?check(?:s|ed|ing)? confirm(?:s|ed|ing)? (?:make|making|made)\ sure
re-?comput(?:e|es|ed|ing) re-?calculat(?:e|es|ed|ing) sanity\ test plug(?:s|ged|ging)?\ (?:\w+\ )?back
"""
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


def _pattern(lemmas: str) -> re.Pattern[str]:
    alternatives = re.split(r"(?<!\\)\s+", lemmas.strip())
    return re.compile(rf"\b(?:{'|'.join(alternatives)})\b".replace(r"\ ", r"\s+"), re.IGNORECASE)


_PATTERNS = {
    "branching": _pattern(_BRANCHING),
    "backtracking": _pattern(_BACKTRACKING),
    "verification": _pattern(_VERIFICATION),
}


@dataclass(frozen=True, slots=True)
class Behaviours:
    """Occurrences in some text, and its words."""

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
        """Of the words."""
        return 1_000 * count / self.words if self.words else 0.0


def behaviours(text: str) -> Behaviours:
    """Count one answer, thinking included."""
    counts = {name: sum(1 for _ in pattern.finditer(text)) for name, pattern in _PATTERNS.items()}
    return Behaviours(words=sum(1 for _ in _WORD.finditer(text)), **counts)
