r"""Separates the units of an answer from its value: 12 \text{ cm} is the value 12 in centimetres.

Units are compared and not converted. A word that is no unit of the table ("apples") is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

Unit: TypeAlias = tuple[tuple[str, int], ...]  # units with their exponents, sorted

# The units that differ from each other, each with its spellings.
_SPELLINGS = """
m meter metre; cm centimeter centimetre; mm millimeter millimetre; km kilometer kilometre; nm nanometer nanometre
in inch inches; ft foot feet; yd yard; mi mile
g gram gramme; kg kilogram; mg milligram; lb lbs pound; oz ounce; ton tonne
s sec second; ms millisecond; min minute; h hr hour; day; week; month; yr year
L l liter litre; mL ml milliliter millilitre; gal gallon
dollar usd USD $; cent ¢; euro EUR €; £ GBP; yen JPY ¥; rupee INR ₹
degree deg; rad radian; degC; degF; K kelvin
N newton; J joule; kJ kilojoule; W watt; kW kilowatt; V volt; A amp ampere; Hz hertz; Pa pascal; kPa; mol mole
mph; kmh kph
am; pm
"""
_UNITS = {
    spelling: entry.split()[0]
    for entry in re.split(r"[;\n]", _SPELLINGS)
    for spelling in entry.split()
    if entry.strip()
}
UNIT_LETTERS = frozenset(spelling for spelling in _UNITS if len(spelling) == 1 and spelling.isascii())
_PREFIXES = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_NO_UNIT = re.compile(r"\b(?:and|or|not|none|at|least|most|more|less|than|about|to|pi|sin|cos|tan|log|ln|exp|mod)\b")
_VARIABLE = re.compile(r"\b(?!sq\b|cu\b)[A-Za-z]{1,2}\b")
_PRODUCTS = UNIT_LETTERS | {"mg", "ms", "nm"}  # glued to a number, they are rather variables
_LONGEST_UNIT = 80  # characters

_SIGN = r"(?:US)?\\?\$|[€£¥₹¢]|(?<![A-Za-z])(?:USD|EUR|GBP)"
_SIGNED = re.compile(rf"(?:{_SIGN})\s*(?=[\d.])|(?<=\d)\s*(?:{_SIGN})|\\text\s*\{{\s*(?:{_SIGN})\s*\}}")
_DEGREES = re.compile(r"(?:\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\s*\\degree(?![A-Za-z]))")
_CELSIUS = re.compile(rf"{_DEGREES.pattern}\s*(?:\\text\s*\{{\s*([CF])\s*\}}|([CF])\s*$)")
_TRIGONOMETRIC = re.compile(r"(?<![A-Za-z])\\?(?:sin|cos|tan|cot|sec|csc)(?!h|\s*\^\s*\{?\s*-)")
_NUMBER_IN_DEGREES = re.compile(rf"(\d+(?:\.\d+)?|\\frac\{{\d+\}}\{{\d+\}}){_DEGREES.pattern}")
_PERCENT = re.compile(
    r"\s*(?:\\?%|\\text\s*\{\s*(?:\\?%|per\s?cent|percentage|pct)\s*\}|(?<=[\d\s])(?:per\s?cent|pct))\s*\Z"
)
_EXPONENT = r"(?:\s*\^\s*(?:\{\s*[-+]?\d\s*\}|\d))?"
_GROUP = rf"\\text\s*\{{[^{{}}]*\}}{_EXPONENT}"
_RATIO = rf"\\frac\s*\{{\s*{_GROUP}\s*\}}\s*\{{\s*{_GROUP}\s*\}}"
_GROUPS = re.compile(rf"\s*(?:{_RATIO}|{_GROUP})(?:(?:\s|\\cdot(?![A-Za-z])|/)*(?:{_RATIO}|{_GROUP}))*")
_WORD = rf"(?:sq\.|cu\.|[A-Za-z]+){_EXPONENT}"
_BARE = re.compile(rf"(?<=[\d)}}\s])\s*({_WORD}(?:(?:\s*/\s*|\s+){_WORD})*)\Z")
_NUMBER = re.compile(r"[-+]?\s*(?:\\(?:frac|sqrt|pi|times|cdot|left|right)(?![A-Za-z])|[\d.,:{}()^/\s\[\]]|(?<=\{)-)+")


@dataclass(frozen=True, slots=True)
class Quantity:
    """An answer. values: its value as LaTeX, first with plain letters at its end, which may be variables, then without
    those that may be a unit."""

    values: tuple[str, str]
    units: frozenset[Unit]
    percent: bool


def quantity(text: str, *, glued: bool = False) -> Quantity:
    """The value of an answer without its units. text: a `formula` of `cluster.jobs.answer_text`.

    glued: whether 5m is five metres rather than five times m.
    """
    units: set[Unit] = set()
    text = _without_degrees(_without_signs(text, units), units)
    percent = _PERCENT.search(text)
    if percent and "%" not in text[: percent.start()] and "," not in text:
        text = text[: percent.start()]
    else:
        percent = None
    text = _without_groups(text, units)
    bare = _without_words(text, units, glued)
    return Quantity((text, bare), frozenset(units), percent is not None)


def _without_signs(text: str, units: set[Unit]) -> str:
    def take(found: re.Match[str]) -> str:
        units.add(((_UNITS[re.sub(r"[\\\s{}]|text", "", found[0]).replace("US$", "$")], 1),))
        return ""

    return _SIGNED.sub(take, text)


def _without_degrees(text: str, units: set[Unit]) -> str:
    """`text` without degree signs; under a trigonometric function, with the angle in radians instead."""
    if found := _CELSIUS.search(text):
        units.add(((f"deg{found[1] or found[2]}", 1),))
        return _CELSIUS.sub("", text)
    if _TRIGONOMETRIC.search(text):
        text = _NUMBER_IN_DEGREES.sub(r"{\\frac{\1\\pi}{180}}", text)
    elif _DEGREES.search(text):
        units.add((("degree", 1),))
    return _DEGREES.sub("", text)


def _without_groups(text: str, units: set[Unit]) -> str:
    r"""`text` without known units in \text{}, and without any words in \text{} at its end."""

    def take(found: re.Match[str]) -> str:
        before = text[: found.start()].rstrip()
        if not before or not (before[-1].isalnum() or before[-1] in "})]!|"):
            return found[0]
        named = _unit(found[0])
        if named:
            units.add(named)
        elif found.end() < len(text) or _NO_UNIT.search(found[0]):
            return found[0]
        return ""

    return _GROUPS.sub(take, text).strip()


def _without_words(text: str, units: set[Unit], glued: bool) -> str:
    """`text` without a unit that is written in plain letters behind a number: 12 cm, 12 square units, 3 apples."""
    found = _BARE.search(text, max(0, len(text) - _LONGEST_UNIT))
    if not found or not _NUMBER.fullmatch(text[: found.start()].rpartition("=")[2].strip()):
        return text
    apart = text[: found.start(1)][-1:].isspace()
    named = _unit(found[1])
    if named and (apart or glued or found[1] not in _PRODUCTS):
        units.add(named)
    elif not apart or _NO_UNIT.search(found[1]) or _VARIABLE.search(found[1]):
        return text
    return text[: found.start()].strip()


def _unit(text: str) -> Unit | None:
    """The unit that `text` names: "m/s^2", "square meters". None if a word of it is no known unit."""
    powers: dict[str, int] = {}
    sign, scale = 1, 1
    for word, exponent, slash in _tokens(text):
        if slash or word == "per":
            sign = -1
        elif word.lower() in _PREFIXES:
            scale = _PREFIXES[word.lower()]
        else:
            name = next((_UNITS[form] for form in _forms(word) if form in _UNITS), None)
            if name is None:
                return None
            powers[name] = powers.get(name, 0) + sign * scale * int(exponent or 1)
            sign, scale = 1, 1
    return tuple(sorted(powers.items())) or None


def _tokens(text: str) -> Iterator[tuple[str, str, str]]:
    text = re.sub(rf"\\frac\s*\{{\s*({_GROUP})\s*\}}\s*\{{\s*({_GROUP})\s*\}}", r"\1/\2", text)
    text = re.sub(r"\\text\s*\{([^{}]*)\}|\\cdot", r" \1 ", text)
    text = re.sub(r"\s+\^", "^", text)
    for found in re.finditer(r"(/)|([^\s/^.{}]+)\.?(?:\^\s*\{?\s*([-+]?\d)\s*\}?)?|(\S)", text):
        yield found[2] or found[4] or "", found[3] or "", found[1] or ""


def _forms(word: str) -> Iterator[str]:
    for form in (word, word.lower() if len(word) > 2 else word):
        yield form
        yield form.removesuffix("s") if len(form) > 2 else form
