"""Small tokenizers of the families that models have, trained on the spot and the same each time.

Byte pairs with the splitting of Llama 3 (up to three digits stay together) and of Qwen (every digit alone), and
pieces of a unigram model behind `▁`, with bytes for characters that it lacks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from actors.text.tokenizer import RoleTokenizer
from benchmarks.real_tokenizers import LLAMA_SPLIT, QWEN_SPLIT, byte_level

END = "<|end|>"
_RARE = -20.0  # log-probability of a byte's token
_SPREAD = 1.5e-4  # from one piece to the next of those that are equally likely
THREE_DIGITS, ONE_DIGIT = LLAMA_SPLIT, QWEN_SPLIT


def byte_pairs(texts: Sequence[str], size: int, split: str) -> RoleTokenizer:
    """Byte-level pairs. size: tokens, the 256 bytes among them and the end not."""
    tokenizer = byte_level({}, [], split)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return _role(tokenizer)


def unigram(texts: Sequence[str], size: int) -> RoleTokenizer:
    """Pieces of a unigram model, single digits. size: tokens, the 256 of bytes among them and the end not."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace("▁", prepend_scheme="never"), pre_tokenizers.Digits(individual_digits=True)]
    )
    special = ["<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=size - 256, special_tokens=special, unk_token=special[0], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    spec = json.loads(tokenizer.to_str())
    model = spec["model"]
    unknown, *pieces = model["vocab"]
    bytes_ = [(f"<0x{byte:02X}>", _RARE) for byte in range(256)]
    model["vocab"] = [unknown, *bytes_, *_ordered({piece: round(score, 6) for piece, score in pieces})]
    model["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _role(tokenizer)


def _ordered(scores: dict[str, float]) -> list[tuple[str, float]]:
    """The likeliest first. Training spreads equal pieces a little, in an order of chance: here it is the alphabet's."""
    ordered = sorted(scores.items(), key=lambda entry: -entry[1])
    runs = [ordered[:1]]
    for before, entry in pairwise(ordered):
        if before[1] - entry[1] > _SPREAD:
            runs.append([])
        runs[-1].append(entry)
    return [
        (piece, score) for run in runs for piece, (_, score) in zip(sorted(piece for piece, _ in run), run, strict=True)
    ]


def _role(tokenizer: Tokenizer) -> RoleTokenizer:
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return RoleTokenizer(tokenizer, {"eos_token": END}, {"vocab_size": tokenizer.get_vocab_size()})
