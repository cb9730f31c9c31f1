"""Tokens as bytes, and text as tokens without the marks and spaces that a tokenizer puts around it.

For measurements only, and written independently of the service's own vocabulary code, so that it can contradict it.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from actors.text.tokenizer import RoleTokenizer
from benchmarks.real_tokenizers import printable_bytes

Ids = NDArray[np.int64]

_BYTE = re.compile("<0x([0-9A-F]{2})>")
_HIGHEST = b"\xff" * 64  # no token's bytes go on like this


class ByteTokenizer:
    """One vocabulary. texts: by id the bytes that a token stands for, None for those that are no text."""

    def __init__(self, tokenizer: RoleTokenizer) -> None:
        spec = json.loads(tokenizer._tokenizer.to_str())
        self._tokenizer = Tokenizer.from_str(json.dumps(_without_first_space(spec)))
        self._tokenizer.encode_special_tokens = True
        self.width = tokenizer.width
        to_bytes = _characters if "ByteLevel" in json.dumps(spec["decoder"]) else _pieces
        self.texts: list[bytes | None] = [None] * self.width
        for token, id_ in tokenizer.text_tokens.items():
            self.texts[id_] = to_bytes(token)
        ordered = sorted((text, id_) for id_, text in enumerate(self.texts) if text)
        self._ascending = [text for text, _ in ordered]
        self._ascending_ids: Ids = np.array([id_ for _, id_ in ordered])
        self.ids: dict[bytes, int] = {}
        for text, id_ in ordered:  # of a character and its byte token, the character: its id is the higher one
            self.ids[text] = id_
        self.text_ids: Ids = np.sort(self._ascending_ids)
        self._longest = max(map(len, self._ascending))

    def encode(self, text: str) -> list[int]:
        """Ids of a text as it stands."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts."""
        return [one.ids for one in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def counterparts(self, of: ByteTokenizer) -> Ids:
        """By id of another vocabulary the token here that has the same bytes, -1 for none."""
        return np.array([self.ids.get(text, -1) if text else -1 for text in of.texts])

    def decode(self, ids: Sequence[int]) -> bytes:
        """The bytes of tokens, all of them text."""
        return b"".join(self.texts[id_] or b"" for id_ in ids)

    def beginnings(self, data: bytes) -> list[int]:
        """Tokens that `data` begins with, the whole of it included."""
        cuts = range(1, min(len(data), self._longest) + 1)
        return [self.ids[data[:cut]] for cut in cuts if data[:cut] in self.ids]

    def longer(self, data: bytes) -> Ids:
        """Tokens that begin with `data` and go on."""
        start = bisect_right(self._ascending, data)
        return self._ascending_ids[start : bisect_left(self._ascending, data + _HIGHEST)]


def _characters(token: str) -> bytes:
    return bytes(_BYTES[character] for character in token)


def _pieces(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte.group(1), 16)]) if byte else token.replace("▁", " ").encode()


_BYTES = {character: byte for byte, character in enumerate(printable_bytes())}


def _without_first_space(spec: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json whose tokenizer does not begin a text with a space."""
    normalizer = spec["normalizer"] or {}
    if normalizer.get("type") == "Sequence":
        normalizer["normalizers"] = [one for one in normalizer["normalizers"] if one["type"] != "Prepend"]
    splitter = spec["pre_tokenizer"] or {}
    for one in (splitter, *splitter.get("pretokenizers", ())):
        if one.get("type") == "Metaspace":
            one["prepend_scheme"] = "never"
    return spec
