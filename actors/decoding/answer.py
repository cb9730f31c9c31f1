"""The text of an answer as it comes: thinking told from content, stop texts found, nothing shown too early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class VisibleText:
    """Text that is now certain, the stop text if one was met, and whether the thinking was just closed."""

    reasoning: str = ""
    content: str = ""
    stop: str | None = None
    closed: bool = False

    def __add__(self, later: VisibleText) -> VisibleText:
        return VisibleText(
            self.reasoning + later.reasoning,
            self.content + later.content,
            later.stop if self.stop is None else self.stop,
            self.closed or later.closed,
        )


class AnswerText:
    """Splits a growing text at the thinking's end and at stop texts.

    A tail that may yet become a marker is held back. Stop texts count in the thinking too, as in vLLM.
    """

    def __init__(self, thinking_end: str | None, stops: Sequence[str], include_stop: bool) -> None:
        """thinking_end: the marker that closes the thinking; None when the answer starts with content."""
        self._end, self._stops, self._include_stop = thinking_end, tuple(stops), include_stop
        self._held = ""

    @property
    def thinking(self) -> bool:
        """Whether the thinking is still open."""
        return self._end is not None

    def push(self, text: str) -> VisibleText:
        """Add text; returns what can be shown. After a stop text nothing more may be pushed."""
        self._held += text
        at, marker = self._first_marker()
        if marker is None:
            return self._show(len(self._held) - self._partial())
        if marker in self._stops:
            shown = self._show(at + (len(marker) if self._include_stop else 0))
            self._held = ""
            return VisibleText(shown.reasoning, shown.content, marker)
        thought = self._held[:at]
        self._held, self._end = self._held[at + len(marker) :], None
        return VisibleText(reasoning=thought, closed=True) + self.push("")

    def close_thinking(self) -> VisibleText:
        """The thinking ended by a token of its own: show what was held back of it."""
        shown = VisibleText(reasoning=self._held, closed=True)
        self._held, self._end = "", None
        return shown

    def flush(self) -> VisibleText:
        """The answer is over: show what was held back."""
        return self._show(len(self._held))

    def _show(self, length: int) -> VisibleText:
        text, self._held = self._held[:length], self._held[length:]
        return VisibleText(reasoning=text) if self.thinking else VisibleText(content=text)

    def _markers(self) -> tuple[str, ...]:
        return self._stops if self._end is None else (*self._stops, self._end)

    def _first_marker(self) -> tuple[int, str | None]:
        """Where the first marker begins, the longest where two begin together; (-1, None) without one."""
        found = [(at, -len(marker), marker) for marker in self._markers() if (at := self._held.find(marker)) >= 0]
        return (min(found)[0], min(found)[2]) if found else (-1, None)

    def _partial(self) -> int:
        """Length of the longest tail that a marker begins with."""
        longest = max((len(marker) for marker in self._markers()), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(marker.startswith(self._held[-length:]) for marker in self._markers()):
                return length
        return 0
