"""Reads what the end of a prompt says about thinking, and makes the prompts of all roles say the same.

A chat template may open the thinking itself, so that its text ends in `<think>` and perhaps a newline. It may also
state that there is none, and end in `</think>`, with or without a `<think>` before. Neither is opened again.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from actors.api.generation import Role
from actors.api.sampling_params import Thinking


class ThinkingState(Enum):
    """Thinking at the beginning of an answer. UNMARKED: the prompt's end has no mark of it."""

    UNMARKED = "unmarked"
    OPEN = "open"
    CLOSED = "closed"


def stated_thinking(text: str, thinking: Thinking) -> ThinkingState:
    """The state that the end of a prompt's text marks. Whitespace after a mark, and around it, does not count."""
    start, end = thinking.start.strip(), thinking.end.strip()
    if start and text.rstrip().endswith(start):
        return ThinkingState.OPEN
    return ThinkingState.CLOSED if end and text.rstrip().endswith(end) else ThinkingState.UNMARKED


def continued_thinking(content: str, thinking: Thinking) -> ThinkingState:
    """The state in a message that is continued: open after a start without an end."""
    start, end = thinking.start.strip(), thinking.end.strip()
    if start and content.rfind(start) > content.rfind(end):
        return ThinkingState.OPEN
    return ThinkingState.UNMARKED


def open_thinking(texts: Mapping[Role, str], thinking: Thinking) -> tuple[dict[Role, str], ThinkingState]:
    """The roles' texts, the primary's first, with the same state of thinking at their ends, and that state.

    The primary's own mark decides. Without one the thinking stays closed if another role's template closes it;
    otherwise it is opened with `thinking.start`, unless that is empty.
    """
    stated = {role: stated_thinking(text, thinking) for role, text in texts.items()}
    primarys = next(iter(stated.values()))
    if ThinkingState.CLOSED in (stated.values() if primarys is ThinkingState.UNMARKED else (primarys,)):
        return close_thinking(texts, thinking)
    if not thinking.start:
        return dict(texts), ThinkingState.UNMARKED
    opened = {
        role: text if stated[role] is ThinkingState.OPEN else _without_closed_block(text, thinking) + thinking.start
        for role, text in texts.items()
    }
    return opened, ThinkingState.OPEN


def close_thinking(texts: Mapping[Role, str], thinking: Thinking) -> tuple[dict[Role, str], ThinkingState]:
    """The roles' texts without thinking that is open at their ends, and the state that it is closed.

    It is closed as the first role's template does that closes it by itself; otherwise with `thinking.end`.
    """
    stated = {role: stated_thinking(text, thinking) for role, text in texts.items()}
    closed = next((texts[role] for role, state in stated.items() if state is ThinkingState.CLOSED), None)
    closing = thinking.end if closed is None else closed[closed.rindex(thinking.end.strip()) :]
    ended = {role: text + closing if stated[role] is ThinkingState.OPEN else text for role, text in texts.items()}
    return ended, ThinkingState.CLOSED


def _without_closed_block(text: str, thinking: Thinking) -> str:
    """A prompt's text without a closed block of thinking at its end."""
    if stated_thinking(text, thinking) is not ThinkingState.CLOSED:
        return text
    rest = text.rstrip().removesuffix(thinking.end.strip())
    start = thinking.start.strip()
    return rest.rstrip().removesuffix(start) if rest.rstrip().endswith(start) else rest
