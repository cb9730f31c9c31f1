"""Splits the text of an answer into thinking and content while it grows, and finds stop texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class VisibleText(NamedTuple):
    """Text that no later token can change, the stop text if one was found, and whether the thinking just ended."""

    reasoning: str = ""
    content: str = ""
    stop: str | None = None
    closed: bool = False

    def then(self, later: VisibleText) -> VisibleText:
        """This text, and a later one behind it."""
        return VisibleText(
            self.reasoning + later.reasoning,
            self.content + later.content,
            later.stop if self.stop is None else self.stop,
            self.closed or later.closed,
        )


class AnswerText:
    """Splits a growing text at the end of the thinking and at stop texts.

    Text that may be the beginning of a marker is held back: with the stop text "END", pushing "a E" returns "a ", and
    pushing "x" then returns "Ex". Stop texts also count within the thinking, as in vLLM.
    """

    def __init__(self, thinking_end: str | None, stops: Sequence[str], include_stop: bool) -> None:
        """thinking_end: the marker that ends the thinking; None if the answer starts with content."""
        self._end, self._stops, self._include_stop = thinking_end, tuple(stops), include_stop
        self._held = ""

    @property
    def thinking(self) -> bool:
        """True while the thinking is open."""
        return self._end is not None

    @property
    def held(self) -> str:
        """Text that may be the beginning of a marker."""
        return self._held

    def push(self, text: str) -> VisibleText:
        """Add text; return the text that can be shown. No more text may be pushed after a stop text."""
        if self._end is None and not (self._stops or self._held):
            return VisibleText("", text)
        self._held += text
        at, marker = self._first_marker()
        if marker is None:
            return self._show(len(self._held) - self._partial_marker_length())
        if marker in self._stops:
            shown = self._show(at + (len(marker) if self._include_stop else 0))
            self._held = ""
            return VisibleText(shown.reasoning, shown.content, marker)
        thought = self._held[:at]
        self._held, self._end = self._held[at + len(marker) :], None
        return VisibleText(reasoning=thought, closed=True).then(self.push(""))

    def close_thinking(self) -> VisibleText:
        """End the thinking at a token that is its end marker; return the text held back."""
        shown = VisibleText(reasoning=self._held, closed=True)
        self._held, self._end = "", None
        return shown

    def flush(self) -> VisibleText:
        """End the answer; return the text held back."""
        return self._show(len(self._held))

    def _show(self, length: int) -> VisibleText:
        text, self._held = self._held[:length], self._held[length:]
        return VisibleText(reasoning=text) if self.thinking else VisibleText(content=text)

    def _markers(self) -> tuple[str, ...]:
        return self._stops if self._end is None else (*self._stops, self._end)

    def _first_marker(self) -> tuple[int, str | None]:
        """Start of the first marker and the marker, the longest if several start there; (-1, None) without one."""
        found = [(at, -len(marker), marker) for marker in self._markers() if (at := self._held.find(marker)) >= 0]
        return (min(found)[0], min(found)[2]) if found else (-1, None)

    def _partial_marker_length(self) -> int:
        """Length of the longest end of the held text that is the beginning of a marker."""
        longest = max((len(marker) for marker in self._markers()), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(marker.startswith(self._held[-length:]) for marker in self._markers()):
                return length
        return 0
