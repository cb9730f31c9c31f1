r"""Normalises the text of answers before graders compare them: LaTeX and Unicode write one answer in many ways.

    words             an answer that is compared as text: \text{Paris}. is Paris
    marked_letters    an answer that names an option: \textbf{C} forty is ‹C› forty
    formula           LaTeX for math-verify: 1\,234² is 1234^{2}

Gold answers and given answers pass through the same functions. They take time in proportion to an answer's length, as
models repeat themselves.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction

from cluster.jobs.units import UNIT_LETTERS

# Commands by their number of arguments in braces. The first two kinds differ in whether the last argument is shown.
_SHOW_LAST = {
    **dict.fromkeys(("boldsymbol", "bm", "mathbf", "mathsf", "mathtt", "mathit", "mathnormal", "pmb", "bold"), 1),
    **dict.fromkeys(("ensuremath", "underline", "uline", "emph", "boxed", "fbox", "framebox", "smash", "makebox"), 1),
    **dict.fromkeys(("textcolor", "colorbox", "href", "raisebox"), 2),
    "fcolorbox": 3,
}
MARKS = "‹›"  # around a letter that stands out from the text beside it
_HIDE = dict.fromkeys(("phantom", "hphantom", "vphantom", "label", "tag", "hspace", "vspace", "footnote"), 1)
_UPRIGHT = (
    *("text", "textbf", "textrm", "textit", "textsf", "texttt", "textsc", "textsl", "textmd", "textup", "textnormal"),
    *("mbox", "hbox", "mathrm"),
)
_LETTER_FONT = re.compile(
    r"\\(?:mathbb|mathcal|mathfrak|mathscr|operatorname)\s*(?:\{\s*)?([A-Za-z])(?![A-Za-z])(?:\s*\})?"
)
_DECLARATIONS = re.compile(
    r"\\(?:(?:display|text|script|scriptscript)style|bf(?:series)?|rm(?:family)?|it(?:shape)?|sf(?:family)?"
    r"|tt(?:family)?|sc(?:shape)?|em|mdseries|upshape|boldmath|[lL]arge|LARGE|[hH]uge|small|normalsize|tiny"
    r"|centering|newline|linebreak|par|hfill|noindent|nonumber|notag|protect|relax|limits|nolimits|strut|mathstrut|allowbreak|[bB]igg?[lrm]?)(?![A-Za-z])\s*"
)
_UNBRACED = re.compile(rf"\\(?:{'|'.join((*_SHOW_LAST, *_UPRIGHT))})(?![A-Za-z])\s*([A-Za-z\d])(?![A-Za-z])")
_COMMAND = re.compile(r"\\([A-Za-z]+)\*?(?![A-Za-z])\s*(?:\[[^\[\]{}]*\]\s*)?(?=\{)")
_SPACE = r"(?<!\\)\\[,;:> ]|(?<!\\)~|\\(?:q?quad|enspace|(?:thin|med|thick)?space|nobreakspace)(?![A-Za-z])"
_SPACES = re.compile(_SPACE)
_INVISIBLE = r"[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]"
_NO_SPACES = re.compile(rf"(?<!\\)\\!\s*|\\negthinspace(?![A-Za-z])|{_INVISIBLE}")
_START = re.compile(rf"\s+|{_SPACE}|\\\\")
_END = re.compile(rf"(?:\s|{_SPACE}|(?<!\\)(?<!\\right)[.,;:。，；：]|\\\\|(?<!\\)\\)\Z")
_LONGEST_END = 16  # characters that one match of _END has at most
_NESTED = 20  # wrappers around an answer; deeper ones stay
_DOLLARS = re.compile(r"\$\$(.*)\$\$|\$([^$]*)\$|\\\((.*)\\\)|\\\[(.*)\\\]", re.DOTALL)
_MARKDOWN = re.compile(r"(\*{1,3}|_{1,3}|`{1,3})(?=\S)([^*_`]*)(?<=\S)\1", re.DOTALL)

_SIGNS = str.maketrans(
    {
        **dict.fromkeys("−‐‑‒–—﹣", "-"),
        **dict.fromkeys("×⨯✕✖", r"\times "),
        **dict.fromkeys("·⋅∙•", r"\cdot "),
        **dict.fromkeys("⁄∕", "/"),
        **dict.fromkeys("′ʹ’", "'"),
        **dict.fromkeys("∣｜", "|"),
        **dict.fromkeys("∅⌀", r"\emptyset "),
        **dict.fromkeys("≤⩽", r"\le "),
        **dict.fromkeys("≥⩾", r"\ge "),
        **{
            "÷": r"\div ",
            "∗": "*",
            "±": r"\pm ",
            "∓": r"\mp ",
            "∞": r"\infty ",
            "°": r"^\circ ",
            "º": r"^\circ ",
            "˚": r"^\circ ",
        },
        **{"≠": r"\ne ", "≈": r"\approx ", "≡": r"\equiv ", "∈": r"\in ", "∉": r"\notin ", "∖": r"\setminus "},
        **{"∪": r"\cup ", "∩": r"\cap ", "⊂": r"\subset ", "⊆": r"\subseteq ", "∧": r"\wedge ", "∨": r"\vee "},
        **{"ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}"},
        **{"⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "⟨": r"\langle ", "⟩": r"\rangle "},
        **{
            "℃": r"^\circ\text{C}",
            "℉": r"^\circ\text{F}",
            "…": r"\ldots ",
            "ℯ": "e",
            "ⅈ": "i",
            "ϕ": r"\phi ",
            "ϵ": r"\epsilon ",
        },
    }
)
_GREEK = re.compile("[αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΥΦΨΩ]")
_SCRIPTS = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ]+|[₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎]+")
_VULGAR = re.compile(r"[¼½¾⅐-⅞]")
_OVERLINED = re.compile(r"(?:\d[\u0304\u0305])+")
_ROOT = re.compile(r"([√∛∜])\s*(\\frac\{\d+\}\{\d+\}|\d+(?:\.\d+)?|\\[A-Za-z]+|[A-Za-z]|(?=[({]))")
_ROOT_TOKEN = re.compile(r"(\\?(?<![A-Za-z])sqrt\s*(\[\d+\])?\s*(?:\\left)?\()|(?:\\right)?[()]|[^()\\s]+|.", re.DOTALL)
_ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}

# A group of three digits after each separator, in whole numbers and after the decimal point.
_SEPARATOR = r"(?:\\[,;: ]|~|\s|\{,\})"
_GROUPED = re.compile(rf"(?<![\d.])(?<!\d\s)\d{{1,3}}({_SEPARATOR})\d{{3}}(?:\1\d{{3}})*(?!\d)")
_GROUPED_DECIMALS = re.compile(rf"(?<=\d\.)\d{{3}}(?:({_SEPARATOR})\d{{3}})*{_SEPARATOR}\d{{1,3}}(?!\d)")
_COMMAS = re.compile(
    r"((?:.*=|\\approx)?\s*[-+]?\s*(?:\\?\$|[€£¥₹])?\s*)(\d{1,3}(?:,\d{3})+(?:\.\d+)?)(\s*(?:[A-Za-z]|\\pi))?"
)
_COMMAS_IN_BRACES = re.compile(r"(?:(?<=\\frac)|(?<=\\sqrt)|(?<=\}))\{\s*(\d{1,3}(?:,\d{3})+)\s*\}")

_FUNCTIONS = ("arcsin", "arccos", "arctan", "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp")
_SHORTHAND: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\\(?:d|t|c|s|nice)frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(rf"(?<![\\A-Za-z])({'|'.join(_FUNCTIONS)})(?![A-Za-z])"), r"\\\1"),
    (re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(?<![\w.])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?)0*(\d{1,9})(?![\w.])"), r"\1 \\times 10^{\2\3}"),
    (re.compile(r"10\^\{\+"), "10^{"),
    (re.compile(r"\^\s*(\\frac\{[^{}]*\}\{[^{}]*\})"), r"^{\1}"),
    (re.compile(r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}"), r"\\binom{\1}{\2}"),
    (re.compile(r"^([^{}]*)\\choose(?![A-Za-z])([^{}]*)$"), r"\\binom{\1}{\2}"),
    (re.compile(r"(?<![A-Za-z])([ap])\.\s?m\.?(?![A-Za-z])", re.IGNORECASE), r"\1m"),
    (re.compile(r"^([-+]?\s*)(?:\\text\s*\{\s*infinity\s*\}|infinity)$", re.IGNORECASE), r"\1\\infty"),
    (re.compile(r"^=\s*"), ""),
    (re.compile(r"^\\(?:approx|simeq|sim)(?![A-Za-z])\s*"), ""),
    (
        re.compile(
            r"^(?:\\text\s*\{\s*)?(?:the\s+)?(?:final\s+)?answer(?:\s+is|\s*:)(?:[\s:]*\}|[\s:])\s*", re.IGNORECASE
        ),
        "",
    ),
)
_BLOCK = r"\d{1,200}"
_REPEATING = re.compile(
    rf"(?<!\d)(\d{{0,200}})\.(\d{{0,200}})(?:\\(?:overline|bar|overbar)\s*(?:\{{\s*({_BLOCK})\s*\}}|(\d))|\(({_BLOCK})\))"
)
_SHOWN_THRICE = re.compile(r"(?<!\d)(\d{0,200})\.(\d{0,50}?)(\d{1,50}?)\3{2,}\s*\\(?:l|c)?dots(?![A-Za-z])")
_DOTTED = re.compile(r"(?<!\d)(\d{0,200})\.(\d{0,200})\\dot\s*\{?(\d)\}?(?:(\d{0,200})\\dot\s*\{?(\d)\}?)?")


def argument_end(text: str, start: int) -> int | None:
    """The place of the brace that closes the argument which begins at `start`; None if none does."""
    depth, place = 1, start
    while place < len(text):
        if text[place] == "\\":
            place += 1  # an escaped brace opens and closes nothing
        elif text[place] in "{}":
            depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return place
        place += 1
    return None


def _unstyled(text: str, styled: Callable[[str], str], upright: Callable[[str], str]) -> str:
    r"""`text` without fonts, colours, boxes, delimiters of mathematics, spaces at its ends and closing punctuation.

    styled and upright return what stands for the argument of \mathbf{} and similar, and of \text{} and similar.
    """
    text = _NO_SPACES.sub("", unicodedata.normalize("NFC", text))
    for _ in range(_NESTED):
        previous = text
        text = _UNBRACED.sub(lambda found: styled(found[1]), _unwrapped(text, styled, upright))
        text = _trimmed(_DECLARATIONS.sub(" ", text))
        for wrapper in (_DOLLARS, _MARKDOWN):
            if found := wrapper.fullmatch(text):
                text = next(group for group in reversed(found.groups()) if group is not None)
        if text.startswith("{") and argument_end(text, 1) == len(text) - 1 and "," not in text:  # {1, 2} may be a set
            text = text[1:-1]
        if text == previous:
            break
    return text


def words(text: str) -> str:
    """The words of an answer with single spaces. Case, brackets and whatever is no style stay."""
    return _spelled(_unstyled(text, str, str))


def marked_letters(text: str) -> str:
    """The words of an answer without braces. A letter with a font or braces of its own gets `MARKS`."""
    text = _LETTER_FONT.sub(rf"{MARKS[0]}\1{MARKS[1]}", unicodedata.normalize("NFKC", text))
    text = _unstyled(re.sub(r"\\checkmark(?![A-Za-z])|\\(?=[{}])", " ", text), _marked, _marked)
    return _spelled(re.sub(r"\{\s*([A-Za-z])\s*\}", rf"{MARKS[0]}\1{MARKS[1]}", text).replace("{", "").replace("}", ""))


def formula(text: str) -> str:
    r"""LaTeX that math-verify reads: without style, with Unicode signs and usual shorthand spelled out.

    \text{}, \mbox{} and \mathrm{} become \text{}, or nothing around a number or a variable.
    """
    text = _from_unicode(text).replace("...", r"\ldots ").replace("{:}", ":").replace(r"\text{,}", "{,}")
    text = _without_grouping(_unstyled(text, str, _upright))
    text = " ".join(_without_grouping(_SPACES.sub(" ", text)).split())
    for pattern, replacement in _SHORTHAND:
        text = pattern.sub(replacement, text)
    for pattern in (_REPEATING, _SHOWN_THRICE, _DOTTED):
        text = pattern.sub(_fraction, text)
    return _trimmed(_with_braced_roots(text))


def _unwrapped(text: str, styled: Callable[[str], str], upright: Callable[[str], str]) -> str:
    """`text` with the outermost commands of style replaced by what they show."""
    parts: list[str] = []
    place = 0
    while found := _COMMAND.search(text, place):
        name, end = found[1], found.end()
        count = _SHOW_LAST.get(name) or _HIDE.get(name) or (1 if name in _UPRIGHT or name == "color" else 0)
        inner = ""
        for _ in range(count):
            close = argument_end(text, end + 1) if text[end : end + 1] == "{" else None
            if close is None:  # leave the rest as it is
                return "".join((*parts, text[place:]))
            inner, end = text[end + 1 : close], close + 1
        if not count:
            parts.append(text[place : found.end()])
            place = found.end()
            continue
        parts.append(text[place : found.start()])
        if name in _UPRIGHT:
            inner = upright(inner)
        elif name in _SHOW_LAST:
            inner = styled(inner)
        elif name == "color" and text[end : end + 1] == "{" and (close := argument_end(text, end + 1)) is not None:
            inner, end = styled(text[end + 1 : close]), close + 1
        else:
            inner = ""
        parts.append(_joined(parts[-1], inner, text[end : end + 1]))
        place = end
    return "".join((*parts, text[place:]))


def _joined(before: str, inner: str, after: str) -> str:
    r"""`inner` such that it stays one script after ^ and _, and that no command takes a neighbour's letters."""
    if before.rstrip().endswith(("^", "_")) and len(inner) > 1 and not inner.startswith(r"\text"):
        return "{" + inner + "}"
    left = " " if re.search(r"\\[A-Za-z]+$", before) and inner[:1].isalpha() else ""
    right = " " if re.search(r"\\[A-Za-z]+$", inner) and after.isalpha() else ""
    return left + inner + right


def _trimmed(text: str) -> str:
    """`text` without spaces and line breaks of LaTeX at its ends and punctuation at its end, in linear time."""
    start, end = 0, len(text)
    while found := _START.match(text, start):
        start = found.end()
    while end > start and (found := _END.search(text, max(start, end - _LONGEST_END), end)):
        end = found.start()
    return text[start:end]


def _marked(inner: str) -> str:
    return f"{MARKS[0]}{inner.strip()}{MARKS[1]}" if re.fullmatch(r"\s*[A-Za-z]\s*", inner) else inner


def _spelled(text: str) -> str:
    """`text` with single spaces, and without backslashes before signs and delimiters."""
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])", "", _SPACES.sub(" ", text))
    text = re.sub(r"(?<!\\)\$|\*\*", "", text)
    return " ".join(re.sub(r"\\([%$&#_])", r"\1", text).split())


def _upright(inner: str) -> str:
    plain = inner.strip()
    if plain in _FUNCTIONS:
        return "\\" + plain
    if re.search(r"\d", plain) or (len(plain) == 1 and plain.isalpha() and plain not in UNIT_LETTERS):
        return plain
    return rf"\text{{{inner}}}"


def _from_unicode(text: str) -> str:
    text = _VULGAR.sub(_vulgar, text)
    text = _SCRIPTS.sub(_script, text)
    text = _OVERLINED.sub(lambda found: r"\overline{" + re.sub(r"\D", "", found[0]) + "}", text)
    text = re.sub("(\\d)\u0307", r"\\dot{\1}", text)
    text = _GREEK.sub(lambda found: _greek(found[0]), text.translate(_SIGNS))
    text = unicodedata.normalize("NFKC", text)
    return _ROOT.sub(_root, text)


def _vulgar(found: re.Match[str]) -> str:
    above, below = unicodedata.normalize("NFKC", found[0]).split("⁄")
    return rf"\frac{{{above}}}{{{below}}}"


def _script(found: re.Match[str]) -> str:
    plain = unicodedata.normalize("NFKC", found[0]).replace("−", "-")
    return f"{'_' if found[0][0] in '₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎' else '^'}{{{plain}}}"


def _greek(letter: str) -> str:
    name = unicodedata.name(letter).rsplit(" ", 1)[1].lower()
    name = {"lamda": "lambda", "final": "sigma"}.get(name, name)
    return "\\" + (name if "SMALL" in unicodedata.name(letter) else name.capitalize()) + " "


def _root(found: re.Match[str]) -> str:
    return _ROOTS[found[1]] + (f"{{{found[2]}}}" if found[2] else "")


def _with_braced_roots(text: str) -> str:
    r"""`text` with \sqrt{x} for \sqrt(x) and sqrt(x)."""
    parts: list[str] = []
    open_roots: list[bool] = []  # of each open parenthesis: whether it is a root's
    for found in _ROOT_TOKEN.finditer(text):
        if found[1]:
            open_roots.append(True)
            parts.append(rf"\sqrt{found[2] or ''}{{")
            continue
        if found[0] == "(":
            open_roots.append(False)
        closes_root = found[0].endswith(")") and bool(open_roots) and open_roots.pop()
        parts.append("}" if closes_root else found[0])
    return text if any(open_roots) else "".join(parts)


def _without_grouping(text: str) -> str:
    text = _GROUPED.sub(lambda found: re.sub(r"\D", "", found[0]), text)
    text = _GROUPED_DECIMALS.sub(lambda found: re.sub(r"\D", "", found[0]), text)
    text = _COMMAS_IN_BRACES.sub(lambda found: found[0].replace(",", ""), text)
    whole = _COMMAS.fullmatch(text)
    return whole[1] + whole[2].replace(",", "") + (whole[3] or "") if whole else text


def _fraction(found: re.Match[str]) -> str:
    """The fraction that a repeating decimal stands for: its whole digits, those that do not repeat, those that do."""
    whole, fixed, *block = (group or "" for group in found.groups())
    repeating = "".join(block)
    value = Fraction(int(repeating), 10 ** len(fixed) * (10 ** len(repeating) - 1))
    value += Fraction(int(f"{whole}{fixed}" or 0), 10 ** len(fixed))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
