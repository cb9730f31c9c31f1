"""Small vocabularies for tests: letters as text tokens, and added tokens at any ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from actors.decoding.vocabulary import Vocabulary

LETTERS = "abcdefgh</>thinkxopdus123W"  # enough to spell every added token of the tests, and "Wait"


def text(first: int = 0) -> dict[str, int]:
    """The text tokens, their ids from `first` on."""
    return {letter: first + i for i, letter in enumerate(dict.fromkeys(LETTERS))}


def vocabulary(
    added: Mapping[str, int], eos: Sequence[str] = (), *, first: int = 0, width: int | None = None
) -> Vocabulary:
    """A vocabulary. width: of its rows, by default that of its ids."""
    ids = {**text(first), **added}
    return Vocabulary(text(first), dict(added), tuple(added[e] for e in eos), width or max(ids.values()) + 1)


def adapter(of: Vocabulary) -> Callable[[str], list[int]]:
    """Encodes like a tokenizer: added tokens first, the rest letter by letter."""

    def encode(string: str) -> list[int]:
        ids = []
        while string:
            found = next((token for token in of.added if string.startswith(token)), string[0])
            ids.append(of.added[found] if found in of.added else of.text[found])
            string = string[len(found) :]
        return ids

    return encode
