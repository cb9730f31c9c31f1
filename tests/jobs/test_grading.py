r"""Grading: the answer that each grader reads in a text, and its comparison with the gold answer.

Tests of whole benchmarks need the folder THINKLOGIT_BENCHMARKS with aime2024.jsonl, aime2025.jsonl, amc23.jsonl and
math500.jsonl: rows with `id` and `answer`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.demo.task import Question
from cluster.jobs.answer_text import formula
from cluster.jobs.grading import Grade, Grader, extract, grade, is_words, last_box
from cluster.jobs.math_process import GradingError, MathProcesses, parsed
from cluster.jobs.units import quantity
from tests.support.deadlines import HANG_S

ROOT = Path(__file__).parents[2]
BENCHMARKS = {"aime2024": 30, "aime2025": 30, "amc23": 40, "math500": 500}
FOLDER = os.environ.get("THINKLOGIT_BENCHMARKS")

needs_benchmarks = pytest.mark.skipif(not FOLDER, reason="THINKLOGIT_BENCHMARKS names no folder of benchmark files")

# Gold answers that are words rather than mathematics; all others parse.
WORDS = {
    "test/algebra/1349.json": r"\text{Evelyn}",
    "test/intermediate_algebra/128.json": r"\text{even}",
    "test/intermediate_algebra/754.json": r"\text{(B)}",
    "test/intermediate_algebra/860.json": r"\text{ellipse}",
    "test/prealgebra/105.json": r"\text{east}",
    "test/prealgebra/1991.json": r"\text{Navin}",
    "test/precalculus/452.json": r"\text{(E)}",
    "test/precalculus/819.json": r"\text{(C)}",
}

# Gold answers of MATH-500 and AIME, each with equal and different answers.
REPRESENTATIVE: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("33", ("033", "33.0", "x = 33"), ("34", "-33", "330")),
    (r"\frac{3}{56}", ("3/56", r"\dfrac{6}{112}", r"\frac3{56}"), (r"\frac{3}{57}", r"\frac{56}{3}", "0.05")),
    (r"1\frac{4}{5}", (r"\frac95", "1.8"), (r"1\frac{4}{6}", r"\frac{4}{5}")),
    (r"(3,4]", (r"\left(3, 4\right]",), ("(3,4)", "[3,4]", "(3,5]")),
    (r"(0,9) \cup (9,36)", (r"(0,9)\cup(9,36)",), ("(0,36)", r"(0,9) \cup (9,37)")),
    (r"x \in [-2,7]", ("[-2,7]",), ("[-2,8]", "(-2,7)")),
    (
        r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}",
        (r"\begin{pmatrix} -\frac13 \\ \frac23 \\ \frac53 \end{pmatrix}",),
        (r"\begin{pmatrix} -1/3 \\ 2/3 \\ 4/3 \end{pmatrix}", r"\begin{pmatrix} 2/3 \\ -1/3 \\ 5/3 \end{pmatrix}"),
    ),
    (r"\left( 3, \frac{\pi}{2} \right)", (r"(3, \pi/2)",), (r"\left( 3, \frac{\pi}{3} \right)", r"(\pi/2, 3)")),
    (r"1,-2", ("-2, 1", "x=1, x=-2"), ("1,2", "1")),
    (r"3 \pm 2 \sqrt{2}", (r"3+2\sqrt2, 3-2\sqrt2",), (r"3 + 2\sqrt{2}", r"3 \pm \sqrt{2}")),
    (r"864 \mbox{ inches}^2", ("864", r"864\text{ in}^2"), (r"865 \mbox{ inches}^2", r"864 \mbox{ inches}^3")),
    (r"\$32,\!348", ("32348", "32,348"), ("32,349", r"\$32")),
    (r"336^\circ", ("336", r"336 \text{ degrees}"), (r"335^\circ",)),
    (r"\frac{270}7\text{ degrees}", (r"\frac{270}{7}^\circ", "270/7"), (r"\frac{270}{8}",)),
    (r"\text{Evelyn}", ("Evelyn", r"\textbf{evelyn}", r"\text{Evelyn.}"), (r"\text{Carla}", "levynE")),
    (r"\text{(C)}", ("C", "(C)", r"\text{C}"), (r"\text{(B)}", "B")),
    ("52_8", ("52_{8}", "52"), ("52_9", "42_8")),
    (".0000672", (r"6.72 \times 10^{-5}", "0.0000672"), (".0000673", "0")),
    ("6 - 5i", ("-5i + 6",), ("6 + 5i", "6 - 4i")),
    (r"(a+5)(b+2)", ("ab + 2a + 5b + 10",), ("(a+5)(b+3)", "(a+b)(b+2)")),
    ("y = 2x + 3", ("y = 3 + 2x", "2x+3"), ("y = 2x - 3",)),
    (r"\pi", (r"\pi",), ("3.14", r"2\pi")),
)


def boxed(answer: str) -> str:
    return rf"So it must be $\boxed{{{answer}}}$."


@pytest.mark.parametrize(("gold", "same", "different"), REPRESENTATIVE, ids=[row[0] for row in REPRESENTATIVE])
def test_equal_forms_of_an_answer_are_right_and_others_wrong(
    gold: str, same: Sequence[str], different: Sequence[str]
) -> None:
    assert [answer for answer in (gold, *same) if not grade("math", boxed(answer), gold).right] == []
    assert [answer for answer in different if grade("math", boxed(answer), gold).right] == []


def corrupted(answer: str) -> Iterator[str]:
    """`answer` with each of its digits changed in turn; without digits, another answer."""
    digits = list(re.finditer(r"\d", answer))
    for digit in digits:
        yield f"{answer[: digit.start()]}{(int(digit[0]) + 1) % 10}{answer[digit.end() :]}"
    if not digits:
        yield r"\text{Mallory}" if "text" in answer else f"7 + {answer}"


def rows_of(name: str) -> list[dict[str, str]]:
    assert FOLDER
    rows = [json.loads(line) for line in (Path(FOLDER) / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == BENCHMARKS[name]
    return rows


@needs_benchmarks
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_gold_answer_except_words_parses(name: str) -> None:
    rows = rows_of(name)
    assert {row["id"]: row["answer"] for row in rows if is_words(row["answer"])} == (WORDS if name == "math500" else {})
    unparsed = [row["id"] for row in rows if isinstance(parsed(quantity(formula(row["answer"])).values[1])[0], str)]
    assert unparsed == []


@needs_benchmarks
@pytest.mark.parametrize("name", BENCHMARKS)
def test_gold_answers_equal_themselves_and_no_answer_with_another_digit(name: str) -> None:
    rows = rows_of(name)
    pairs = [(row, row["answer"], True) for row in rows]
    pairs += [(row, wrong, False) for row in rows for wrong in corrupted(row["answer"])]
    with ThreadPoolExecutor(4) as pool:
        graded = list(pool.map(lambda pair: grade("math", boxed(pair[1]), pair[0]["answer"]), pairs))
    off = {row["id"]: answer for (row, answer, right), found in zip(pairs, graded, strict=True) if found.right != right}
    assert off == {}


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{1} or rather \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed {3}", "3"),
        (r"\fbox{4}", "4"),
        (r"\boxed{1} and \boxed{2", None),
        (r"within \boxed{}", None),
        ("the answer is 5", None),
    ],
)
def test_the_last_box_is_read_whole_or_not_at_all(text: str, box: str | None) -> None:
    assert last_box(text) == box


@pytest.mark.parametrize("grader", ["math", "letter", "exact"])
def test_thinking_is_not_read_as_an_answer(grader: Grader) -> None:
    assert extract(grader, r"<think>\boxed{B}</think>It is \boxed{C}.") == "C"
    assert extract(grader, r"<think>\boxed{B}</think>") is None
    assert extract(grader, r"It is \boxed{C}.") == "C"


@pytest.mark.parametrize(
    "written", ["B", "(B)", "b", r"\text{B}", r"\textbf{(B)}", "B.", "B) 5 m/s", "B: it", "Option B"]
)
def test_a_letter_is_read_in_every_usual_form(written: str) -> None:
    assert grade("letter", boxed(written), "B") == Grade("B", True)
    assert grade("letter", boxed(written), "C") == Grade("B", False)


@pytest.mark.parametrize("written", ["A and B", "AB", "answer", "42", r"\frac{B}{C}"])
def test_text_without_a_single_option_has_no_letter(written: str) -> None:
    assert grade("letter", boxed(written), "B") == Grade(None, False)


def test_initials_are_the_stated_capital_letters_or_those_of_the_last_line() -> None:
    assert grade("initials", "The capital is Lima: L. Tokyo: T. The answer is LT.", "LT") == Grade("LT", True)
    assert grade("initials", "The answer is X. No, the answer is L, T\nA new Line", "LT") == Grade("LT", True)
    assert grade("initials", "<think>A</think>L and T", "LT") == Grade("LT", True)
    assert grade("initials", "Lima, Tokyo", "LT") == Grade(None, False)
    assert grade("initials", "The answer is TL.", "LT") == Grade("TL", False)


def test_number_is_the_stated_answer_or_the_last_number() -> None:
    assert grade("number", "12 + 3 = 15. The answer is 15. In 2020", "15") == Grade("15", True)
    assert grade("number", "The answer is 1. No, the answer is $1,234.50.", "1234.5") == Grade("1234.50", True)
    assert grade("number", "<think>7</think>He has 3.0 left", "3") == Grade("3.0", True)
    assert grade("number", "The answer is −3.", "-3").right
    assert not grade("number", "The answer is 3.", "-3").right
    assert grade("number", "5, so the answer is unknown", "5").right
    assert grade("number", "no idea", "5") == Grade(None, False)


def test_exact_answers_are_compared_word_for_word() -> None:
    assert grade("exact", boxed("New  York"), "New York") == Grade("New York", True)
    assert grade("exact", boxed("New York"), "New  York") == Grade("New York", True)
    assert grade("exact", "<think>hm</think>I know it.\n Paris \n", "Paris") == Grade("Paris", True)
    assert not grade("exact", boxed("paris"), "Paris").right
    assert grade("exact", "", "Paris") == Grade(None, False)


def test_multihop_grades_like_the_embedded_task() -> None:
    question = Question("Ada", ("rival", "mentor"))
    assert grade("multihop", question.reasoned_answer, question.answer) == Grade(question.answer, True)
    assert grade("multihop", question.direct_answer, "Nobody") == Grade(question.answer, False)
    assert grade("multihop", f"<think>{question.thinking}", question.answer) == Grade(None, False)


def test_an_unknown_grader_is_named() -> None:
    with pytest.raises(ValueError, match="unknown grader 'maths'; the graders are math, letter"):
        grade("maths", "", "")  # type: ignore[arg-type]


@pytest.mark.parametrize("answer", [r"9^{9^{9^{9}}}", "1000000!", "(" * 2_000, "\x00", "\ud800"])
def test_a_hostile_answer_is_wrong_in_bounded_time_and_blocks_no_other(answer: str) -> None:
    processes = MathProcesses(1, cpu_s=1.0)
    began = time.monotonic()
    assert not processes.equal("5", answer)
    assert time.monotonic() - began < 60
    assert processes.equal("5", "5.0")
    processes.close()


def test_grading_is_thread_safe() -> None:
    processes = MathProcesses(2)
    handler = signal.getsignal(signal.SIGALRM)
    with ThreadPoolExecutor(8) as pool:
        verdicts = list(pool.map(lambda n: processes.equal(str(n), rf"\frac{{{2 * n}}}{{2}}"), range(40)))
    processes.close()
    assert verdicts == [True] * 40
    assert signal.getsignal(signal.SIGALRM) is handler


def test_a_killed_grading_process_raises_instead_of_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = MathProcesses(1)
    assert processes.equal("1", "1")
    child = processes._idle.queue[0]
    assert child is not None
    monkeypatch.setattr(type(child), "ended", property(lambda self: False))  # it dies after the check
    child._process.kill()
    child._process.wait()
    with pytest.raises(GradingError, match="ended"):
        processes.equal("1", "1")
    monkeypatch.undo()
    assert processes.equal("1", "1")
    processes.close()


def test_grading_processes_end_with_their_parent() -> None:
    code = (
        "import os, signal\n"
        "from cluster.jobs.math_process import MathProcesses\n"
        "p = MathProcesses(1); assert p.equal('1', '1'); print(p._idle.queue[0]._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    child = int(done.stdout)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}/cmdline").exists() and b"math_process" in Path(f"/proc/{child}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the child still runs"
        time.sleep(0.05)
