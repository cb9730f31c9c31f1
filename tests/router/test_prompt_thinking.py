"""The state of thinking at the ends of the roles' prompts is read, and made the same for all roles."""

from __future__ import annotations

import pytest

from actors.api.generation import ROLES, Role
from actors.api.sampling_params import Thinking
from router.prompt_thinking import ThinkingState, close_thinking, continued_thinking, open_thinking, stated_thinking

OPEN, CLOSED, UNMARKED = ThinkingState.OPEN, ThinkingState.CLOSED, ThinkingState.UNMARKED
THINK = Thinking(start="<think>")
BLOCK = "<think>\n\n</think>\n\n"


def opened(*ends: str, thinking: Thinking = THINK) -> tuple[list[str], ThinkingState]:
    texts: dict[Role, str] = dict(zip(ROLES, ends, strict=False))
    result, state = open_thinking(texts, thinking)
    return [*result.values()], state


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("a", UNMARKED),
        ("a<think>", OPEN),
        ("a<think>\n", OPEN),
        ("a<think> \n\t\n", OPEN),
        ("a" + BLOCK, CLOSED),
        ("a</think>", CLOSED),
        ("<think>a</think>b", UNMARKED),
        ("<think>a</think>b<think>\n", OPEN),
        ("", UNMARKED),
    ],
)
def test_the_last_mark_of_a_prompt_states_the_thinking(text: str, state: ThinkingState) -> None:
    assert stated_thinking(text, THINK) is state


def test_marks_count_without_the_whitespace_around_them() -> None:
    assert stated_thinking("a[T]", Thinking(start="\n[T]\n", end="\n[/T]\n")) is OPEN
    assert stated_thinking("a[/T]\n\n", Thinking(start="\n[T]\n", end="\n[/T]\n")) is CLOSED
    assert stated_thinking("a\n", Thinking(start="\n", end="\n")) is UNMARKED


@pytest.mark.parametrize("at", [0, 1, 2])
def test_one_role_that_opens_by_itself_keeps_its_text(at: int) -> None:
    ends = ["p"] * 3
    ends[at] = "p<think>\n"
    expected = ["p<think>"] * 3
    expected[at] = "p<think>\n"
    assert opened(*ends) == (expected, OPEN)


def test_roles_that_all_open_by_themselves_are_not_changed() -> None:
    assert opened("t<think>\n", "g<think>", "b<think>\n\n") == (["t<think>\n", "g<think>", "b<think>\n\n"], OPEN)


def test_a_closed_primary_closes_the_roles_that_open() -> None:
    assert opened("t" + BLOCK, "g<think>\n", "b") == (["t" + BLOCK, "g<think>\n</think>\n\n", "b"], CLOSED)


def test_a_small_role_that_is_closed_keeps_a_silent_primary_closed() -> None:
    assert opened("t", "g" + BLOCK, "b") == (["t", "g" + BLOCK, "b"], CLOSED)


def test_a_primary_that_opens_by_itself_opens_closed_roles() -> None:
    texts, state = opened("t<think>\n", "g\n" + BLOCK, "b</think>")
    assert (texts, state) == (["t<think>\n", "g\n<think>", "b<think>"], OPEN)


def test_thinking_that_is_not_wanted_is_closed_where_a_template_opens_it() -> None:
    every: dict[Role, str] = {"target": "t<think>\n", "guider": "g", "guider_base": "b<think>"}
    assert close_thinking(every, THINK) == (
        {"target": "t<think>\n</think>", "guider": "g", "guider_base": "b<think></think>"},
        CLOSED,
    )
    every["guider"] += BLOCK
    assert close_thinking(every, THINK)[0]["target"] == "t<think>\n</think>\n\n"


def test_without_a_start_no_prompt_changes() -> None:
    assert opened("t", "g<think>\n", "b", thinking=Thinking()) == (["t", "g<think>\n", "b"], UNMARKED)
    assert opened("t" + BLOCK, "g", "b", thinking=Thinking())[1] is CLOSED


def test_a_continued_message_is_open_after_a_start_without_an_end() -> None:
    texts = ["<think>So", "<think>So</think>It", "It", "It <think>a</think> <think>b"]
    assert [continued_thinking(text, THINK) for text in texts] == [OPEN, UNMARKED, UNMARKED, OPEN]
    assert continued_thinking("It", Thinking()) is UNMARKED
