r"""Whether an answer is right: what is read from a text, and what it is held against.

    math       the last \boxed{} after the thinking, equal to the gold answer as math-verify sees it
    letter     the last \boxed{} after the thinking, which names one option: B, (B), \text{B}, B. because ...
    exact      the last \boxed{} after the thinking, else the last line, word for word
    multihop   the embedded task's own: "The answer is Ben."

The thinking ends at the last </think>. A text without one, as base models write, is read as a whole, as in the
published evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from cluster.demo.task import answer_in
from cluster.jobs.math_process import MathProcesses

Grader: TypeAlias = Literal["math", "letter", "multihop", "exact"]
GRADERS: tuple[Grader, ...] = get_args(Grader)

_THINK_END = "</think>"
_BOXES = re.compile(r"\\(?:boxed|fbox)\s*\{")
_STYLE = re.compile(r"\\(?:text|textbf|textrm|textit|mbox|mathrm|mathbf|mathsf|bold)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"\s*\\(?:text|textbf|textrm|mbox|mathrm)\s*\{[^{}\d]*\}\s*")
_BASED = re.compile(r"\s*[0-9A-Fa-f]+\s*_\s*(?:\{\s*(\d+)\s*\}|(\d))\s*")
_LETTER = re.compile(r"(?:option|choice|answer)?[\s:]*\(?([A-Z])\)?\s*(?:[.:)].*)?", re.IGNORECASE | re.DOTALL)
_MATH = MathProcesses()


@dataclass(frozen=True, slots=True)
class Grade:
    """extracted: the answer that was read, None where the text gives none, which is never right."""

    extracted: str | None
    right: bool


def grade(grader: Grader, text: str, answer: str) -> Grade:
    """Grade `text`, a whole reply with its thinking, against the gold `answer`.

    Safe on any thread. It may take seconds of processor time ("math"), so an event loop asks it on a thread. Raises
    GradingError where the machine cannot compare, and ValueError for a grader that does not exist.
    """
    if grader not in GRADERS:
        raise ValueError(f"unknown grader {grader!r}; the graders are {', '.join(GRADERS)}")
    extracted = extract(grader, text)
    return Grade(extracted, extracted is not None and _SAME[grader](answer, extracted))


def extract(grader: Grader, text: str) -> str | None:
    """The answer that `grader` reads in `text`, None where there is none."""
    if grader == "multihop":
        return answer_in(text)
    final = text.rpartition(_THINK_END)[2]
    box = last_box(final)
    if grader == "math":
        return box
    if grader == "letter":
        return _letter(box) if box else None
    return _words(box or final.rstrip().rpartition("\n")[2]) or None


def is_words(gold: str) -> bool:
    r"""Whether a gold answer is \text{of words}, which "math" holds against words rather than against mathematics."""
    return _WORDS.fullmatch(gold) is not None


def last_box(text: str) -> str | None:
    r"""What stands in the last \boxed{} of `text`; None where there is none, or it is empty or not closed."""
    starts = [match.end() for match in _BOXES.finditer(text)]
    if not starts:
        return None
    depth, place = 1, starts[-1]
    while place < len(text):
        if text[place] == "\\":
            place += 1  # what is escaped opens and closes nothing
        elif text[place] in "{}":
            depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return text[starts[-1] : place].strip() or None
        place += 1
    return None


def _letter(box: str) -> str | None:
    found = _LETTER.fullmatch(_unstyled(box))
    return found.group(1).upper() if found else None


def _unstyled(text: str) -> str:
    r"""`text` without \text{} and its like, and without mathematics' dollar signs."""
    previous = None
    while text != previous:
        previous, text = text, _STYLE.sub(r"\1", text)
    return text.replace("$", "").strip()


def _words(text: str) -> str:
    return " ".join(text.split())


def _plain(text: str) -> str:
    return _words(_unstyled(text)).strip("(). ").casefold()


def _same_math(gold: str, given: str) -> bool:
    """Words are held against words, and 52_8 is not 52_9, though math-verify drops the base."""
    if is_words(gold):
        return _plain(gold) == _plain(given)
    bases = [_base(gold), _base(given)]
    if None not in bases and bases[0] != bases[1]:
        return False
    return _MATH.equal(gold, given)


def _base(number: str) -> int | None:
    found = _BASED.fullmatch(number)
    return int(found.group(1) or found.group(2)) if found else None


_SAME: dict[Grader, Callable[[str, str], bool]] = {
    "math": _same_math,
    "letter": lambda gold, given: _letter(gold) == given,
    "exact": lambda gold, given: _words(gold) == given,
    "multihop": str.__eq__,
}
