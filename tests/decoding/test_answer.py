"""Splitting an answer's text does not depend on how it is cut into pieces."""

from __future__ import annotations

import itertools

import pytest

from actors.decoding.answer import AnswerText, VisibleText


def run(
    pieces: list[str], end: str | None = None, stops: tuple[str, ...] = (), include_stop: bool = False
) -> VisibleText:
    """All text shown of an answer in pieces, flushed unless it was stopped."""
    answer, shown = AnswerText(end, stops, include_stop), VisibleText()
    for piece in pieces:
        shown = shown.then(answer.push(piece))
        if shown.stop is not None:
            return shown
    return shown.then(answer.flush())


def cuts(text: str) -> list[list[str]]:
    """The text as a whole, letter by letter, and cut at each place and each two places."""
    ways = [[text], list(text)]
    for places in itertools.chain(
        itertools.combinations(range(1, len(text)), 1), itertools.combinations(range(1, len(text)), 2)
    ):
        borders = [0, *places, len(text)]
        ways.append([text[a:b] for a, b in itertools.pairwise(borders)])
    return ways


def test_a_stop_text_is_found_across_any_borders() -> None:
    for pieces in cuts("one STOP two"):
        assert run(pieces, stops=("STOP",)) == VisibleText(content="one ", stop="STOP")


def test_a_stop_text_is_shown_when_asked_for() -> None:
    for pieces in cuts("one STOP two"):
        assert run(pieces, stops=("STOP",), include_stop=True) == VisibleText(content="one STOP", stop="STOP")


def test_the_first_stop_text_counts_then_the_longest() -> None:
    assert run(["a\n\nb"], stops=("b", "\n")).stop == "\n"
    assert run(["a\n\nb"], stops=("\n", "\n\n")).stop == "\n\n"


def test_nothing_is_shown_that_may_become_a_stop_text() -> None:
    answer = AnswerText(None, ("</end>",), False)
    assert answer.push("so </e") == VisibleText(content="so ")
    assert answer.push("n") == VisibleText()
    assert answer.push("ough") == VisibleText(content="</enough")
    assert answer.push("<") == VisibleText()
    assert answer.flush() == VisibleText(content="<")


def test_text_without_markers_is_shown_at_once() -> None:
    answer = AnswerText(None, (), False)
    assert [answer.push(text).content for text in ("a", "", "b<")] == ["a", "", "b<"]


def test_the_end_of_the_thinking_splits_any_pieces() -> None:
    for pieces in cuts("hm</think>42"):
        assert run(pieces, end="</think>") == VisibleText(reasoning="hm", content="42", closed=True)


def test_an_unclosed_thinking_is_all_reasoning() -> None:
    for pieces in cuts("hm </thi"):
        assert run(pieces, end="</think>") == VisibleText(reasoning="hm </thi")


def test_only_the_first_end_closes_the_thinking() -> None:
    assert run(["a</think>b</think>c"], end="</think>") == VisibleText(reasoning="a", content="b</think>c", closed=True)


def test_stop_texts_count_in_the_thinking_too() -> None:
    for pieces in cuts("a STOP</think>b"):
        assert run(pieces, end="</think>", stops=("STOP",)) == VisibleText(reasoning="a ", stop="STOP")


def test_a_stop_text_right_after_the_thinking_stops() -> None:
    for pieces in cuts("a</think>STOP"):
        assert run(pieces, end="</think>", stops=("STOP",)) == VisibleText(reasoning="a", closed=True, stop="STOP")


def test_a_stop_text_equal_to_the_end_of_the_thinking_stops() -> None:
    assert run(["a</think>b"], end="</think>", stops=("</think>",)) == VisibleText(reasoning="a", stop="</think>")


def test_a_thinking_that_ended_by_a_token_shows_what_was_held_back() -> None:
    answer = AnswerText("</think>", (), False)
    assert answer.push("x </th") == VisibleText(reasoning="x ")
    before = answer.thinking
    assert answer.close_thinking() == VisibleText(reasoning="</th", closed=True)
    assert (before, answer.thinking) == (True, False)
    assert answer.push("y") == VisibleText(content="y")


@pytest.mark.parametrize("stops", [(), ("ab",), ("aba", "bb")])
def test_the_pieces_never_change_what_is_shown(stops: tuple[str, ...]) -> None:
    text = "aabb</think>abab"
    whole = run([text], end="</think>", stops=stops)
    for pieces in cuts(text):
        assert run(pieces, end="</think>", stops=stops) == whole
