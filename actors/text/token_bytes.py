"""Encodes text in the middle of an answer, byte for byte: without BOS, added tokens, dummy space and normaliser.

A normaliser such as NFC changes bytes, but here the tokens of a text must decode to its bytes. Supported are
byte-level BPE, SentencePiece (BPE or Unigram, with or without byte tokens) and WordPiece.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

from tokenizers import Tokenizer

_SPACE = "▁"  # SentencePiece's
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SHORT, _CACHED = 48, 4096  # length in characters of cached texts, and their number
_WORDS = re.compile(r" +[^ ]*|[^ ]+")  # pieces that SentencePiece never merges
# Normalisers that change bytes.
_REMOVED = ("Prepend", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Strip", "StripAccents")


class UnsupportedTokenizer(ValueError):
    """The tokens of this kind of tokenizer have no bytes. The message names the kind."""


class ByteTokenizerAdapter:
    """Implements `actors.decoding.cross_vocab.tables.TokenizerAdapter` with a tokenizer of the `tokenizers` library."""

    def __init__(self, tokenizer: Tokenizer, text_tokens: Mapping[str, int]) -> None:
        """text_tokens: content -> id, without added tokens."""
        self._tokenizer = _mid_text(tokenizer)
        self._kind = _kind_of(tokenizer, text_tokens)
        self._byte_level = self._kind == "bytes"
        # Sessions encode the same words again and again, and both small models encode the same text.
        self._cached_encode = lru_cache(_CACHED)(self._encode)
        self._cached_restart = lru_cache(_CACHED)(self._restart)
        self.texts: list[bytes | None] = [None] * (max(text_tokens.values(), default=-1) + 1)
        for token, id_ in text_tokens.items():
            self.texts[id_] = _bytes_of(token, self._kind)
        self._byte_ids = self._ids_of_bytes(text_tokens)
        # If tokens span a space, any following text can change the tokens before it.
        self._spans_spaces = self._kind == "spaces" and any(_SPACE in token.strip(_SPACE) for token in text_tokens)

    @cached_property
    def digest(self) -> str:
        """A digest of all settings that affect the encoding."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        return self._cached_encode(text) if len(text) <= _SHORT else self._encode(text)

    def _encode(self, text: str) -> tuple[list[int], list[int]]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        texts = self.texts
        ends = list(accumulate([len(texts[id_] or b"") for id_ in ids]))
        if (ends[-1] if ends else 0) == len(text.encode()):
            return ids, ends
        # A token has other bytes than the text (an unknown word, another case): use the ends of its characters.
        return ids, [len(text[:end].encode()) for _, end in encoding.offsets[:-1]] + [len(text.encode())] * bool(ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of bytes that are not UTF-8: byte-level BPE merges them, other kinds use one id for each byte.

        Empty if the vocabulary has no ids for them.
        """
        if self._byte_level:
            written = "".join(_LETTERS[byte] for byte in data)
            return [token.id for token in self._tokenizer.model.tokenize(written)]
        ids = [self._byte_ids.get(byte, -1) for byte in data]
        return ids if min(ids, default=-1) >= 0 else []

    def restart(self, text: str) -> int:
        return self._cached_restart(text) if len(text) <= _SHORT else self._restart(text)

    def _restart(self, text: str) -> int:
        for start in () if self._spans_spaces else reversed(list(self._pieces(text))):
            if not text[start:].isspace():
                return start
        return 0

    def _pieces(self, text: str) -> Iterator[int]:
        """Starts of the pieces that are encoded by themselves."""
        if self._kind == "spaces":
            return (piece.start() for piece in _WORDS.finditer(text))
        return (start for _, (start, _) in self._tokenizer.pre_tokenizer.pre_tokenize_str(text))

    def _ids_of_bytes(self, text_tokens: Mapping[str, int]) -> dict[int, int]:
        if self._byte_level:
            return {byte: text_tokens[letter] for byte, letter in enumerate(_LETTERS) if letter in text_tokens}
        found = ((_BYTE.fullmatch(token), id_) for token, id_ in text_tokens.items())
        return {int(match[1], 16): id_ for match, id_ in found if match}


def without_first_space(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer without the space that it puts before a text; the tokenizer itself if it puts none."""
    normalizer, pre_tokenizer, _ = _steps(tokenizer)
    changed = {
        "normalizer": _without_steps(normalizer, "normalizers", ("Prepend",)),
        "pre_tokenizer": _without_first_space(pre_tokenizer),
    }
    if changed == {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}:
        return tokenizer
    return Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | changed))


def _mid_text(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer for a piece from the middle of a text. Both have one vocabulary in memory."""
    normalizer, pre_tokenizer, decoder = _steps(tokenizer)
    normalizer = _without_steps(normalizer, "normalizers", _REMOVED)
    changed = {"normalizer": normalizer, "pre_tokenizer": _without_first_space(pre_tokenizer), "decoder": decoder}
    model: dict[str, Any] = {"type": "BPE", "vocab": {}, "merges": []}  # the library reads steps in whole files only
    steps = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model, **changed}))
    made = Tokenizer(tokenizer.model)
    for name, step in changed.items():
        if step is not None:
            setattr(made, name, getattr(steps, name))
    return made


def _steps(tokenizer: Tokenizer) -> list[dict[str, Any] | None]:
    """The settings of normaliser, pre-tokenizer and decoder."""
    steps = (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder)
    return [step and json.loads(step.__getstate__()) for step in steps]


def _without_steps(step: dict[str, Any] | None, parts: str, removed: Sequence[str]) -> dict[str, Any] | None:
    if step is None or step["type"] in removed:
        return None
    if step["type"] == "Sequence":
        kept = [part for part in (_without_steps(each, parts, removed) for each in step[parts]) if part is not None]
        return {**step, parts: kept} if kept else None
    strips = step["type"] == "BertNormalizer" and "StripAccents" in removed
    return {**step, "strip_accents": False} if strips else step


def _without_first_space(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """The pre-tokenizer without the space that it puts before a text."""
    if step is None:
        return None
    if step["type"] == "Sequence":
        return {**step, "pretokenizers": [_without_first_space(part) for part in step["pretokenizers"]]}
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    return {**step, "add_prefix_space": False} if "add_prefix_space" in step else step


def _kind_of(tokenizer: Tokenizer, tokens: Iterable[str]) -> str:
    """The kind of tokenizer: "bytes" is byte-level BPE, "spaces" SentencePiece, "words" WordPiece."""
    _, pre_tokenizer, decoder = _steps(tokenizer)
    model = type(tokenizer.model).__name__
    if "ByteLevel" in (*_types(pre_tokenizer, "pretokenizers"), *_types(decoder, "decoders")):
        return "bytes"
    if model == "WordPiece":
        return "words"
    if model in ("BPE", "Unigram") and any(_SPACE in token for token in tokens):
        return "spaces"
    raise UnsupportedTokenizer(f"a {model} vocabulary that is neither byte-level nor SentencePiece's")


def _types(step: Mapping[str, Any] | None, parts: str) -> Iterator[str]:
    if step is not None:
        yield step["type"]
        for part in step.get(parts) or ():
            yield from _types(part, parts)


def _bytes_of(token: str, kind: str) -> bytes | None:
    """The bytes of a token in the middle of a text."""
    if kind == "bytes":
        try:
            return bytes(_BYTES[letter] for letter in token)
        except KeyError:
            return None  # not in the alphabet of bytes, so the tokenizer never yields this token
    if kind == "words":
        if token.startswith("##"):
            return token[2:].encode()
        return (" " + token if token[:1].isalnum() else token).encode()
    if match := _BYTE.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace(_SPACE, " ").encode()


def _alphabet() -> list[str]:
    """By byte the letter that stands for it in byte-level BPE (GPT-2)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(others)) for byte in range(256)]


_LETTERS = _alphabet()
_BYTES = {letter: byte for byte, letter in enumerate(_LETTERS)}
