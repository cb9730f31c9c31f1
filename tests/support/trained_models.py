"""Tokenizers trained on local text, and small language models over them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from actors.decoding.candidates import Floats
from actors.decoding.cross_vocab.translators import Alignment
from actors.text.alignment_cache import align
from actors.text.tokenizer import RoleTokenizer
from benchmarks.corpora import Corpus, corpora
from benchmarks.trained_tokenizers import ONE_DIGIT, THREE_DIGITS, byte_pairs, unigram

KINDS = ("grouped", "single", "large", "pieces", "bytes")


@cache
def texts() -> dict[str, Corpus]:
    """The local texts by kind, without this repository's pages: no edit of a page changes what is drawn from them."""
    return corpora(60_000, pages=False)


@cache
def tokenizer(kind: str) -> RoleTokenizer:
    """A tokenizer of a kind.

    grouped: byte-level BPE, up to three digits in a token. single: single digits. small: the same with few tokens.
    large: the same with more tokens, of another text. pieces: SentencePiece's unigram. bytes: one token for each byte.
    """
    english, math, code = (texts()[name].train for name in ("english", "reasoning", "code"))
    if kind == "small":
        return byte_pairs([english, math], 500, ONE_DIGIT)
    if kind == "grouped":
        return byte_pairs([english, math], 900, THREE_DIGITS)
    if kind == "single":
        return byte_pairs([math, code], 1_400, ONE_DIGIT)
    if kind == "large":
        return byte_pairs([english, code], 4_000, ONE_DIGIT)
    return unigram([english, math], 1_200) if kind == "pieces" else byte_pairs([english], 256, ONE_DIGIT)


@cache
def alignment(target: str, role: str) -> Alignment:
    return align(tokenizer(target), tokenizer(role))


def hashed(of: RoleTokenizer, seed: int, order: int = 3) -> Callable[[Sequence[int]], Floats]:
    """Logits that depend on the texts of the newest tokens, not on their ids."""
    texts = [text if text is not None else b"" for text in of.adapter.texts]
    texts += [b"<end>"] * (of.width - len(texts))
    vectors = np.stack([_vector(bytes([seed]) + text) for text in texts])

    @cache
    def row(context: bytes) -> Floats:
        logits: Floats = 1.3 * vectors @ _vector(bytes([seed + 7]) + context)
        return logits

    return lambda tokens: row(b"|".join(texts[token] for token in tokens[-order:]))


def _vector(data: bytes) -> Floats:
    return np.random.default_rng(zlib.crc32(data)).normal(size=24)
