"""How a tokenizer spells text inside an answer: no BOS, no added tokens, no dummy space, no normaliser.

A normaliser such as NFC moves bytes, and what is spelled here is a piece of a text: it must come out as its bytes.
Byte-level BPE, SentencePiece (BPE or Unigram, with or without byte tokens) and WordPiece.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

from tokenizers import Tokenizer

_SPACE = "▁"  # SentencePiece's
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SHORT, _REMEMBERED = 48, 4096  # characters of a text that is remembered, and how many of them are
_WORDS = re.compile(r" +[^ ]*|[^ ]+")  # pieces that SentencePiece never spells together
_MOVING = ("Prepend", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Strip", "StripAccents")  # what is left out


class UnsupportedTokenizer(ValueError):
    """A kind of tokenizer whose tokens cannot be read as bytes; the message names it."""


class ByteTokenizerAdapter:
    """Implements `actors.decoding.cross_vocab.tables.Speller` over a tokenizer of the `tokenizers` library."""

    def __init__(self, tokenizer: Tokenizer, text_tokens: Mapping[str, int]) -> None:
        """text_tokens: content -> id, without added tokens."""
        settings = _bare(json.loads(tokenizer.to_str()))
        self._kind = _kind_of(settings)
        self._bare = Tokenizer.from_str(json.dumps(settings))
        self._byte_level = self._kind == "bytes"
        # Sessions spell the same words over and over, and each small model spells what the other has.
        self._remembered = lru_cache(_REMEMBERED)(self._encode)
        self._remembered_restart = lru_cache(_REMEMBERED)(self._restart)
        self.texts: list[bytes | None] = [None] * (max(text_tokens.values(), default=-1) + 1)
        for token, id_ in text_tokens.items():
            self.texts[id_] = _bytes_of(token, self._kind)
        self._byte_ids = self._bytes_alone(text_tokens)
        # Where tokens reach over a space, any later text may change the tokens before it.
        self._whole = self._kind == "spaces" and any(_SPACE in token.strip(_SPACE) for token in text_tokens)

    @cached_property
    def digest(self) -> str:
        """Of all that decides how it spells."""
        return hashlib.sha256(self._bare.to_str().encode()).hexdigest()

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of a text, and the bytes of it up to the end of each; neither may be changed."""
        return self._remembered(text) if len(text) <= _SHORT else self._encode(text)

    def _encode(self, text: str) -> tuple[list[int], list[int]]:
        encoding = self._bare.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        texts = self.texts
        ends = list(accumulate([len(texts[id_] or b"") for id_ in ids]))
        if (ends[-1] if ends else 0) == len(text.encode()):
            return ids, ends
        # A token that stands for other bytes than its own (an unknown word, another case): where its characters end.
        return ids, [len(text[:end].encode()) for _, end in encoding.offsets[:-1]] + [len(text.encode())] * bool(ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts."""
        return [encoding.ids for encoding in self._bare.encode_batch(list(texts), add_special_tokens=False)]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of bytes that are no text: those of single bytes merged as the vocabulary merges them, where it has them.

        Empty where it has none for them.
        """
        if self._byte_level:
            written = "".join(_LETTERS[byte] for byte in data)
            return [token.id for token in self._bare.model.tokenize(written)]
        ids = [self._byte_ids.get(byte, -1) for byte in data]
        return ids if min(ids, default=-1) >= 0 else []

    def restart(self, text: str) -> int:
        """Characters of a text whose tokens stay as they are, whatever follows."""
        return self._remembered_restart(text) if len(text) <= _SHORT else self._restart(text)

    def _restart(self, text: str) -> int:
        for start in () if self._whole else reversed(list(self._pieces(text))):
            if not text[start:].isspace():
                return start
        return 0

    def _pieces(self, text: str) -> Iterator[int]:
        """Where the pieces begin that are spelled by themselves."""
        if self._kind == "spaces":
            return (piece.start() for piece in _WORDS.finditer(text))
        return (start for _, (start, _) in self._bare.pre_tokenizer.pre_tokenize_str(text))

    def _bytes_alone(self, text_tokens: Mapping[str, int]) -> dict[int, int]:
        if self._byte_level:
            return {byte: text_tokens[letter] for byte, letter in enumerate(_LETTERS) if letter in text_tokens}
        found = ((_BYTE.fullmatch(token), id_) for token, id_ in text_tokens.items())
        return {int(match[1], 16): id_ for match, id_ in found if match}


def _bare(settings: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer for a piece from the middle of a text."""
    normalizer = _without(settings["normalizer"], "normalizers", _MOVING)
    pre_tokenizer = _in_mid_text(settings["pre_tokenizer"])
    return {
        **settings,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "added_tokens": [],
        "truncation": None,
        "padding": None,
    }


def _without(step: dict[str, Any] | None, parts: str, left_out: Sequence[str]) -> dict[str, Any] | None:
    if step is None or step["type"] in left_out:
        return None
    if step["type"] == "Sequence":
        kept = [part for part in (_without(each, parts, left_out) for each in step[parts]) if part is not None]
        return {**step, parts: kept} if kept else None
    return {**step, "strip_accents": False} if step["type"] == "BertNormalizer" else step


def _in_mid_text(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """A pre-tokenizer that puts no space before a text."""
    if step is None:
        return None
    if step["type"] == "Sequence":
        return {**step, "pretokenizers": [_in_mid_text(part) for part in step["pretokenizers"]]}
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    return {**step, "add_prefix_space": False} if "add_prefix_space" in step else step


def _kind_of(settings: Mapping[str, Any]) -> str:
    """bytes: byte-level BPE; spaces: SentencePiece; words: WordPiece."""
    steps = list(_types(settings["pre_tokenizer"], "pretokenizers"))
    decoders = list(_types(settings["decoder"], "decoders"))
    model = settings["model"]["type"]
    if "ByteLevel" in steps or "ByteLevel" in decoders:
        return "bytes"
    if model == "WordPiece":
        return "words"
    spaced = any(_SPACE in token for token in _entries(settings["model"]))
    if model in ("BPE", "Unigram") and spaced:
        return "spaces"
    raise UnsupportedTokenizer(f"a {model} vocabulary that is neither byte-level nor SentencePiece's")


def _types(step: Mapping[str, Any] | None, parts: str) -> Iterator[str]:
    if step is not None:
        yield step["type"]
        for part in step.get(parts) or ():
            yield from _types(part, parts)


def _entries(model: Mapping[str, Any]) -> Iterator[str]:
    vocab = model["vocab"]
    yield from (vocab if isinstance(vocab, Mapping) else (entry[0] for entry in vocab))


def _bytes_of(token: str, kind: str) -> bytes | None:
    """What a token stands for in the middle of a text."""
    if kind == "bytes":
        try:
            return bytes(_BYTES[letter] for letter in token)
        except KeyError:
            return None  # not written in the alphabet of bytes: a token that the tokenizer never yields
    if kind == "words":
        if token.startswith("##"):
            return token[2:].encode()
        return (" " + token if token[:1].isalnum() else token).encode()
    if match := _BYTE.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace(_SPACE, " ").encode()


def _alphabet() -> list[str]:
    """By byte the letter that byte-level BPE writes for it (GPT-2)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(others)) for byte in range(256)]


_LETTERS = _alphabet()
_BYTES = {letter: byte for byte, letter in enumerate(_LETTERS)}
