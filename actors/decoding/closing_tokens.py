"""Finds the tokens that would complete a text, such as the end of the thinking, after the text so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable


class ClosingTokens:
    """The tokens that complete one text, in one vocabulary.

    Example for the text "</think>": after "so </think" these are ">", ">\\n" and all others that begin with ">"; after
    any text these are tokens that hold the whole of it. Texts are bytes, since a token may end within a character.
    """

    def __init__(self, text: str, candidates: Iterable[int], token_bytes: Callable[[int], bytes]) -> None:
        """candidates: ids that hold the text's last byte; others complete nothing. token_bytes: the bytes of an id."""
        self._text, self._token_bytes = text.encode(), token_bytes
        self._whole: set[int] = set()
        self._after: list[set[int]] = [set() for _ in self._text]  # by bytes of the text that are there
        for id_ in candidates:
            data = token_bytes(id_)
            if self._text in data:
                self._whole.add(id_)
            for there in range(1, len(self._text)):
                if data.startswith(self._text[there:]):
                    self._after[there].add(id_)

    def extend(self, tail: bytes, token: int) -> bytes:
        """The end of a text, as far as it matters here, with one more token."""
        return (tail + self._token_bytes(token))[-len(self._text) :]

    def after(self, tail: bytes) -> set[int]:
        """The ids that complete the text after this end of a text."""
        found = set(self._whole)
        for there in range(1, len(self._text)):
            if self._after[there] and tail.endswith(self._text[:there]):
                found |= self._after[there]
        return found
