r"""Graders: read the answer in a reply and compare it with the right ("gold") answer.

    math       the last \boxed{} after the thinking, equal to the gold answer according to math-verify
    letter     the last \boxed{} after the thinking, which names one option: B, (B), \text{B}, B. because ...
    exact      the last \boxed{} after the thinking, otherwise the last line, equal word for word
    multihop   the format of the embedded task: "The answer is Ben."

The thinking ends at the last </think>. A text without one, as base models write it, is read as a whole, as in the
published evaluation.

How to add a grader:
1. Add its name to `Grader` below. Task files and `cluster.jobs.choose_alpha --grader` then accept it.
2. Read the answer in `extract`: a branch that returns the answer's text, or None if there is none.
3. Compare it in `_SAME`: a function of (gold answer, extracted answer) that returns True if they are equal.
4. Test both in `tests/jobs/test_grading.py`, add a line to the list above and a row to the table in `docs/tasks.md`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, assert_never, get_args

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
    """extracted: the answer that was read, None if the text has none, which is never right."""

    extracted: str | None
    right: bool


def grade(grader: Grader, text: str, answer: str) -> Grade:
    """Compare `text`, a whole reply with its thinking, with the gold `answer`.

    Thread-safe. "math" may take seconds of processor time, so call it in a thread of an event loop. Raises GradingError
    if this machine cannot compare answers, and ValueError for an unknown grader.
    """
    if grader not in GRADERS:
        raise ValueError(f"unknown grader {grader!r}; the graders are {', '.join(GRADERS)}")
    extracted = extract(grader, text)
    return Grade(extracted, extracted is not None and _SAME[grader](answer, extracted))


def extract(grader: Grader, text: str) -> str | None:
    """The answer that `grader` reads in `text`, None if there is none."""
    if grader == "multihop":
        return answer_in(text)
    final = text.rpartition(_THINK_END)[2]
    box = last_box(final)
    if grader == "math":
        return box
    if grader == "letter":
        return _letter(box) if box else None
    if grader == "exact":
        return _words(box or final.rstrip().rpartition("\n")[2]) or None
    assert_never(grader)


def is_words(gold: str) -> bool:
    r"""True if a gold answer is \text{of words}, which "math" compares as words rather than as mathematics."""
    return _WORDS.fullmatch(gold) is not None


def last_box(text: str) -> str | None:
    r"""The content of the last \boxed{} of `text`; None if there is none, or if it is empty or not closed."""
    starts = [match.end() for match in _BOXES.finditer(text)]
    if not starts:
        return None
    depth, place = 1, starts[-1]
    while place < len(text):
        if text[place] == "\\":
            place += 1  # an escaped brace opens and closes nothing
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
    r"""`text` without \text{} and similar commands, and without the dollar signs of mathematics."""
    previous = None
    while text != previous:
        previous, text = text, _STYLE.sub(r"\1", text)
    return text.replace("$", "").strip()


def _words(text: str) -> str:
    return " ".join(text.split())


def _plain(text: str) -> str:
    return _words(_unstyled(text)).strip("(). ").casefold()


def _same_math(gold: str, given: str) -> bool:
    """Words are compared as words. 52_8 differs from 52_9, although math-verify drops the base."""
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
