r"""Graders: read the answer in a reply and compare it with the right ("gold") answer.

    math       the last \boxed{} after the thinking, equal to the gold answer according to math-verify
    letter     the last \boxed{} after the thinking, which names one option: B, (B), \text{B}, B. because ...
    exact      the last \boxed{} after the thinking, otherwise the last line, equal word for word
    number     the number behind the last "answer is", otherwise the last number; numbers are compared by value
    initials   the capital letters behind the last "answer is", otherwise those of the last line: M, L, T is MLT
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
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, TypeAlias, assert_never, get_args

from cluster.demo.task import answer_in
from cluster.jobs.answer_text import MARKS, argument_end, formula, marked_letters, words
from cluster.jobs.math_process import MathProcesses
from cluster.jobs.units import Quantity, quantity

Grader: TypeAlias = Literal["math", "letter", "number", "initials", "multihop", "exact"]
GRADERS: tuple[Grader, ...] = get_args(Grader)

_THINK_END = "</think>"
_BOXES = re.compile(r"\\(?:boxed|fbox)\s*\{")
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_WORDS = re.compile(r"\s*\\(?:text|textbf|textrm|mbox|mathrm)\s*\{[^{}\d]*\}\s*")
_BASED = re.compile(r"\s*[0-9A-Fa-f]+\s*_\s*(?:\{\s*(\d+)\s*\}|(\d))\s*")
_INTRODUCTION = (
    r"(?:\b(?:the|my|correct|right|best|final|answer|option|choice|is)\b|\bI\s+(?:choose|pick|select|think)(?:\s+it)?\b"
    r"|[\s:=✓✔✅☑]|答案|选项|选择|[选是为])*"
)
_REASON = (
    r"\s*(?:[.,:;)!].*|[—–].*|\s-+\s.*|--+.*|\s+is\s+(?:the\s+)?(?:correct|right|best|answer|option|choice|\s)+"
    r"|\s*[✓✔✅☑]|\s+\((?!\s*(?:or|and)\b).*|\s+(?:because|since|only)\b.*)?"
)
_OPEN, _CLOSE = rf"[(\[【{MARKS[0]}]\s*", rf"\s*[)\]】{MARKS[1]}]"
_LETTER = re.compile(
    rf"{_INTRODUCTION}(?:(?:{_OPEN})+([A-Z])(?:{_CLOSE})+(?:{_REASON}|\s+\w.*)|(?:{_OPEN})?([A-Z]){_REASON})",
    re.IGNORECASE | re.DOTALL,
)
# A second option in what follows the first: at once ("A, C"), or marked as one ("A) yes, C) no").
_SECOND = re.compile(
    rf"^[\s.,:;)\]{MARKS[1]}!&/—–-]*(?:(?:and|or|not)\s+)?"
    r"(?!I\s*(?:,|and|or)\s*I|[A-Z]\s+(?:and|or)\s+[A-Z]\s+only)"  # an option's own text: "C. I and II only"
    rf"(?:{_OPEN})?([A-Za-z])"
    rf"(?=(?:{_CLOSE})+(?![\w^])|\s*(?:$|[.,;:&/]|and\b|or\b))"
    r"|[(\[]([A-Z])[)\]]|(?<![\w(])([A-Z])[).:](?=\s)"
)
_NOTHING = re.compile(r"nan|null|none|n/?a", re.IGNORECASE)
_NAME = re.compile(r"\s*[A-Za-z]{2,}\s*")
_WHOLE = re.compile(r"[-+]?[\d.,]+")
_NUMBER = re.compile(r"[-−]?\d+(?:,\d{3})*(?:\.\d+)?")
_CAPITALS = re.compile(r"\b[A-Z]+\b")
_ANSWER_IS = re.compile(r"\banswer is\b", re.IGNORECASE)
_DEGREES, _RADIANS = frozenset({(("degree", 1),)}), frozenset({(("rad", 1),)})
_RADIAN_VALUE = re.compile(r"\\(?:pi|arc(?:sin|cos|tan))(?![A-Za-z])")
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
    if grader == "number":
        return _number(final)
    if grader == "initials":
        return _initials(final)
    if grader == "exact":
        return words(box or final.rstrip().rpartition("\n")[2]) or None
    assert_never(grader)


def unanswerable(grader: Grader, gold: str, options: Collection[str] = ()) -> str | None:
    """Why no answer can be right with this gold answer; None if one can. options: letters that the question offers."""
    if grader == "letter" and len(options) > 1 and _letter(gold) not in (None, *options):
        return f"the question offers only {', '.join(options)}"
    refused = grader == "math" and (_NOTHING.fullmatch(gold) or argument_end(gold + "}", 0) != len(gold))
    if not refused and any(grade(grader, reply, gold).right for reply in (rf"\boxed{{{gold}}}", gold)):
        return None
    accepted = {
        "math": "LaTeX without a box and with balanced braces, such as \\frac{1}{2}",
        "letter": "an option's letter, such as B or (B)",
        "exact": "words or a number",
        "number": "a number in digits, such as -1,234.5",
        "initials": "capital letters, such as MLT",
        "multihop": "a name",
    }
    return f"no answer can be right, because grader {grader} needs {accepted[grader]}"


def is_words(gold: str) -> bool:
    r"""True if a gold answer is \text{of words}, which "math" compares as words rather than as mathematics."""
    return _WORDS.fullmatch(gold) is not None


def last_box(text: str) -> str | None:
    r"""The content of the last \boxed{} of `text`; None if there is none, or if it is empty or not closed.

    A \} without its \{ closes it if nothing else does: in \boxed{12 \} the backslash belongs to the answer.
    """
    starts = [match.end() for match in _BOXES.finditer(text)]
    if not starts:
        return None
    end = argument_end(text, starts[-1])
    if end is None:
        end = _stray_brace(text, starts[-1])
    return None if end is None else text[starts[-1] : end].strip() or None


def _stray_brace(text: str, start: int) -> int | None:
    depth = 0
    for found in _ESCAPED.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(found[1], 0)
        if depth < 0:
            return found.start(1)
    return None


def _letter(box: str) -> str | None:
    text = marked_letters(box).strip("\"'“”‘’`* ")
    found = _LETTER.fullmatch(text)
    if not found:
        return None
    letter, after = (found[1], found.end(1)) if found[1] else (found[2], found.end(2))
    others = {next(filter(None, other.groups())).upper() for other in _SECOND.finditer(text[after:])}
    return letter.upper() if others <= {letter.upper()} else None


def _number(text: str) -> str | None:
    stated = _ANSWER_IS.split(text)[1:]
    found = _NUMBER.search(stated[-1]) if stated else None
    numbers = [found[0]] if found else _NUMBER.findall(text)
    return numbers[-1].replace(",", "").replace("−", "-") if numbers else None


def _initials(text: str) -> str | None:
    stated = _ANSWER_IS.split(text)[1:]
    line = stated[-1].partition("\n")[0] if stated else text.rstrip().rpartition("\n")[2]
    return "".join(_CAPITALS.findall(line)) or None


def _plain(text: str) -> str:
    return words(text).strip("(). ").casefold()


def _same_words(gold: str, given: str) -> bool:
    gold, given = words(gold), words(given)
    return gold == given != ""


def _same_math(gold: str, given: str) -> bool:
    """Words are compared as words. 52_8 differs from 52_9, although math-verify drops the base, and 12 cm from 12 m."""
    if is_words(gold):
        return _plain(gold) == _plain(given) != ""
    if _NAME.fullmatch(gold) and _plain(gold) == _plain(given):
        return True
    formulas = formula(gold), formula(given)
    if formulas[0] == formulas[1]:
        return formulas[0] != ""
    bases = [_base(text) for text in formulas]
    if None not in bases and bases[0] != bases[1]:
        return False
    right = quantity(formulas[0])
    answer = quantity(formulas[1], glued=_WHOLE.fullmatch(formulas[0]) is not None)
    right, answer = _in_radians(right, answer), _in_radians(answer, right)
    if right.units and answer.units and right.units != answer.units:
        return False
    return any(_MATH.equal(*pair) for pair in dict.fromkeys(_pairs(right, answer)))


def _pairs(right: Quantity, answer: Quantity) -> Iterator[tuple[str, str]]:
    """The values to compare. 50 % equals 50 and .5."""
    pairs = list(zip(right.values, answer.values, strict=True))
    yield from pairs
    for gold, given in pairs:
        if right.percent != answer.percent:
            yield (_scaled(gold, "100"), given) if right.percent else (gold, _scaled(given, "100"))


def _in_radians(one: Quantity, other: Quantity) -> Quantity:
    """`one` in radians if it is in degrees and `other` in radians, or without a unit and with pi or an arcus."""
    if one.units != _DEGREES or not (
        other.units == _RADIANS or (not other.units and _RADIAN_VALUE.search(other.values[0]))
    ):
        return one
    first, second = (_scaled(value, r"180}\cdot{\pi") for value in one.values)
    return Quantity((first, second), _RADIANS, percent=False)


def _scaled(value: str, divisor: str) -> str:
    return rf"\frac{{{value}}}{{{divisor}}}"


def _base(number: str) -> int | None:
    found = _BASED.fullmatch(number)
    return int(found.group(1) or found.group(2)) if found else None


_SAME: dict[Grader, Callable[[str, str], bool]] = {
    "math": _same_math,
    "letter": lambda gold, given: _letter(gold) == given,
    "exact": _same_words,
    "number": lambda gold, given: Decimal(_number(gold) or "NaN") == Decimal(given),
    "initials": str.__eq__,
    "multihop": str.__eq__,
}
