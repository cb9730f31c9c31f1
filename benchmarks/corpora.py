"""Texts of four kinds, the same in every run: English, Python, worked arithmetic and mathematics.

English is the prose in the docstrings of the standard library and the pages of this repository, Python the standard
library's own code; so both depend on the version of Python. The other two are generated, with numbers of one to seven
digits, as a reasoning model writes them; where THINKLOGIT_BENCHMARKS names a folder of problem files (*.jsonl with
`problem` or `question`), their texts join the mathematics.
"""

from __future__ import annotations

import ast
import json
import os
import random
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cluster.demo.english import COMMON_WORDS

ROOT = Path(__file__).parent.parent
SIZE = 500_000  # characters of a kind
_HELD_OUT = 10  # every tenth document is
_LONGEST_SOURCE = 60_000  # bytes: longer files are mostly tables
_SKIPPED = ("test", "tests", "idlelib", "lib2to3", "site-packages", "encodings", "pydoc_data", "__pycache__")
_PROSE = 200  # characters of a docstring that is more than a line


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents of one kind: those that models are trained on, and those held out."""

    train: str
    held_out: str


def corpora(size: int = SIZE, pages: bool = True) -> dict[str, Corpus]:
    """All kinds by name, of `size` characters each. pages: with those of this repository, which change often."""
    kinds: dict[str, Callable[[], Iterator[str]]] = {
        "english": english if pages else docstrings,
        "code": code,
        "reasoning": lambda: reasoning(random.Random(1)),
        "math": lambda: mathematics(random.Random(2)),
    }
    return {name: _divide(documents(), size) for name, documents in kinds.items()}


def mixture(
    texts: Mapping[str, Corpus], shares: Mapping[str, float], skipped: Mapping[str, float] | None = None
) -> str:
    """A training text of a share of each kind, taken after the share that is `skipped`."""
    parts = []
    for name, share in shares.items():
        whole = texts[name].train
        start = int(len(whole) * (skipped or {}).get(name, 0.0))
        parts.append(whole[start : start + int(len(whole) * share)])
    return "\n".join(parts)


def english() -> Iterator[str]:
    """Pages of this repository, and docstrings of the standard library."""
    for page in (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))):
        yield from re.split(r"\n(?=#)", page.read_text(encoding="utf-8"))
    yield from docstrings()


def docstrings() -> Iterator[str]:
    """Docstrings of the standard library in the order of its modules."""
    for source in _modules():
        yield from _docstrings(source)


def code() -> Iterator[str]:
    """Classes and functions of the standard library, in the order of its modules."""
    for source in _modules():
        yield from source.split("\n\n\n")


def _modules() -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        inside = file.relative_to(library).parts
        if not set(inside) & set(_SKIPPED) and 0 < file.stat().st_size <= _LONGEST_SOURCE:
            yield file.read_text(encoding="utf-8", errors="replace")


def _docstrings(source: str) -> Iterator[str]:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented):
            text = ast.get_docstring(node)
            if text and len(text) >= _PROSE and ">>>" not in text:
                yield re.sub(r"(?<=[a-z,;])\n(?=[a-z])", " ", text)


def _divide(documents: Iterator[str], size: int) -> Corpus:
    """Documents up to `size` characters, every tenth held out."""
    parts: tuple[list[str], list[str]] = ([], [])
    taken = 0
    for index, document in enumerate(documents):
        parts[index % _HELD_OUT == _HELD_OUT - 1].append(document)
        taken += len(document)
        if taken >= size:
            break
    return Corpus("\n".join(parts[0]), "\n".join(parts[1]))


# -- worked arithmetic


def reasoning(rng: random.Random) -> Iterator[str]:
    """Endless solutions of word problems, step by step, as a model thinks aloud."""
    nouns = [word for word in COMMON_WORDS.split() if len(word) > 4]
    while True:
        yield _solution(rng, nouns)


def _solution(rng: random.Random, nouns: list[str]) -> str:
    things, place = rng.choice(nouns), rng.choice(nouns)
    first, second = _number(rng), _number(rng)
    lines = [
        f"Question: A {place} has {first} {things}s and gets {second} more {rng.choice(_TIMES)}. How many are there "
        f"after {rng.randint(2, 48)} {rng.choice(_TIMES)[5:]}s?\n<think>\n{rng.choice(_OPENINGS)} "
        f"we have {first} {things}s at the start."
    ]
    value = first
    for _ in range(rng.randint(3, 7)):
        said, value = _step(rng, value)
        lines.append(f"{rng.choice(_LINKS)} {said}")
        if rng.random() < 0.25:
            lines.append(_check(rng, value))
    lines.append(f"</think>\nThe answer is \\boxed{{{value}}}.\n")
    return "\n".join(lines)


def _step(rng: random.Random, value: int) -> tuple[str, int]:
    other = _number(rng)
    match rng.randrange(6):
        case 0:
            return f"add {other}: {value} + {other} = {value + other}, so the total is {value + other}.", value + other
        case 1:
            low, high = sorted((value, other))
            return f"subtract {low} from {high}: {high} - {low} = {high - low}.", high - low
        case 2:
            factor = rng.randint(2, 97)
            small = value % 10_000
            tens, ones = factor // 10 * 10, factor % 10
            return (
                f"compute {small} × {factor}. {small} × {tens} = {small * tens} and {small} × {ones} = {small * ones}; "
                f"adding, {small * tens} + {small * ones} = {small * factor}.",
                small * factor,
            )
        case 3:
            divisor = rng.randint(3, 25)
            return (
                f"divide by {divisor}: {value} = {divisor} × {value // divisor} + {value % divisor}, so the remainder "
                f"is {value % divisor} and the quotient is {value // divisor}.",
                value // divisor + 1,
            )
        case 4:
            return (
                f"take {other}%: {other}% of {value} is {value * other / 100:.2f}, about {value * other // 100}.",
                value + 1,
            )
        case _:
            year = rng.randint(1500, 2100)
            return f"compare: in {year} there were {value}, in {year + 10} there were {value + other}.", value + other


def _check(rng: random.Random, value: int) -> str:
    return f"{rng.choice(_DOUBTS)} {value} has the digit sum {sum(map(int, str(value)))}, {rng.choice(_VERDICTS)}"


def _number(rng: random.Random) -> int:
    """One to five digits, small ones oftener, round ones often."""
    value = int(10 ** rng.uniform(0, 5))
    return round(value, -len(str(value)) + 2) if rng.random() < 0.3 else value


_TIMES = ("each hour", "each day", "each week", "each month", "each year")
_OPENINGS = ("Okay, so", "Let me think about this step by step. First,", "Alright,", "To solve this,", "Hmm,", "So")
_LINKS = (
    "Then",
    "Next,",
    "Now",
    "So we",
    "After that,",
    "Let's",
    "We need to",
    "That means we",
    "I will",
    "Therefore, we",
)
_DOUBTS = ("Wait, let me double-check.", "Hold on,", "But wait,", "Let me verify:", "Just to be sure,")
_VERDICTS = ("which looks right.", "so that is correct.", "which makes sense.", "so I made no mistake.", "okay.")


# -- mathematics


def mathematics(rng: random.Random) -> Iterator[str]:
    """Endless formulas in LaTeX, after the problems of THINKLOGIT_BENCHMARKS."""
    folder = os.environ.get("THINKLOGIT_BENCHMARKS")
    if folder:
        yield from islice(_problems(Path(folder)), 2000)
    while True:
        yield _formula(rng)


def _problems(folder: Path) -> Iterator[str]:
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if text := row.get("problem") or row.get("question"):
                yield f"{text}\n{row.get('solution') or row.get('answer') or ''}\n"


def _formula(rng: random.Random) -> str:
    a, b, c, d = (_number(rng) for _ in range(4))
    x, y = rng.sample("abcknxyz", 2)
    return rng.choice(
        (
            f"Solve ${x}^2 + {a}{x} - {b} = 0$. The discriminant is ${a}^2 + 4 \\cdot {b} = {a * a + 4 * b}$.\n",
            f"$\\frac{{{a}}}{{{b}}} + \\frac{{{c}}}{{{b}}} = \\frac{{{a + c}}}{{{b}}}$\n",
            f"Find the remainder when ${a}^{{{b % 90 + 2}}}$ is divided by ${c}$.\n",
            f"Let ${x} = {a}$ and ${y} = {b}$. Then ${x} + {y} = {a + b}$, and ${x}{y} = {a * b}$.\n",
            f"$$\\sum_{{{x}=1}}^{{{a}}} {x} = \\frac{{{a} \\cdot {a + 1}}}{{2}} = {a * (a + 1) // 2}$$\n",
            f"The triangle has sides ${a}$, ${b}$ and ${c}$, so its perimeter is ${a + b + c}$.\n",
            f"$\\sqrt{{{a * a}}} = {a}$, hence ${x} \\equiv {b} \\pmod{{{c}}}$ has ${d}$ solutions.\n",
            f"How many integers between ${a}$ and ${a + b}$ are multiples of ${c % 97 + 2}$?\n",
            f"$({x} - {a})({x} + {b}) = {x}^2 + {b - a}{x} - {a * b}$\n",
        )
    )
