"""Tokenizers of published models, read from Python packages that carry their files.

    pip install --no-deps dashscope==2.0.2 llama-models==0.3.0 mistral-common==1.13.1

Nothing of a package is imported: it is looked for by name, and its file is converted to what `tokenizers` reads, with
the ids of the model. A package that is not installed is a tokenizer that is not measured.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from actors.text.tokenizer import RoleTokenizer

LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

Vocabulary = dict[str, int]
Merges = list[tuple[str, str]]


def real_tokenizers() -> dict[str, RoleTokenizer]:
    """Those whose packages are installed, by the name of their family."""
    found = {name: load() for name, load in LOADERS.items()}
    return {name: tokenizer for name, tokenizer in found.items() if tokenizer is not None}


def qwen() -> RoleTokenizer | None:
    """Qwen 1.5 to 3: bytes, single digits; dashscope."""
    file = _file("dashscope", "resources/qwen.tiktoken")
    if file is None:
        return None
    ranks = _tiktoken(file)
    tokenizer = byte_level(*byte_level_model(ranks), QWEN_SPLIT)
    tokenizer.normalizer = normalizers.NFC()
    return _role(tokenizer, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos="<|im_end|>")


def llama3() -> RoleTokenizer | None:
    """Llama 3: bytes, up to three digits; llama-models."""
    file = _file("llama_models", "llama3/tokenizer.model")
    if file is None:
        return None
    tokenizer = byte_level(*byte_level_model(_tiktoken(file)), LLAMA_SPLIT, whole_words=True)
    named = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]
    named += ["<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"]
    named += ["<|eot_id|>", "<|python_tag|>", "<|image|>"]
    specials = named + [f"<|reserved_special_token_{number}|>" for number in range(2, 256 - len(named) + 2)]
    return _role(tokenizer, specials, eos="<|eot_id|>", bos="<|begin_of_text|>")


def tekken() -> RoleTokenizer | None:
    """Mistral's later models: bytes, single digits, words split where their case changes; mistral-common."""
    file = _file("mistral_common", "data/tekken_240911.json")
    if file is None:
        return None
    saved: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    config = saved["config"]
    reserved: int = config["default_num_special_tokens"]
    kept = saved["vocab"][: config["default_vocab_size"] - reserved]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in kept}
    vocabulary, merges = byte_level_model(ranks)
    specials = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{number}>" for number in range(3, reserved))]
    shifted = {token: id_ for id_, token in enumerate(specials)}
    shifted |= {token: id_ + reserved for token, id_ in vocabulary.items()}
    tokenizer = byte_level(shifted, merges, config["pattern"], whole_words=True)
    return _role(tokenizer, specials, eos="</s>", bos="<s>")


def mistral() -> RoleTokenizer | None:
    """Mistral's first models: SentencePiece, single digits, bytes where a character is missing; mistral-common."""
    file = _file("mistral_common", "data/tokenizer.model.v1")
    if file is None:
        return None
    scores = sentence_pieces(file.read_bytes())
    vocabulary = {piece: id_ for id_, piece in enumerate(scores)}
    merges = sorted(_merges(vocabulary), key=lambda pair: (-scores["".join(pair)], -len(pair[0]), -len(pair[1])))
    unknown = next(iter(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _role(tokenizer, list(vocabulary)[:3], eos="</s>", bos="<s>")


LOADERS: Mapping[str, Callable[[], RoleTokenizer | None]] = {
    "Llama 3": llama3,
    "Qwen": qwen,
    "Mistral": mistral,
    "Tekken": tekken,
}


def byte_level(vocabulary: Vocabulary, merges: Merges, split: str, whole_words: bool = False) -> Tokenizer:
    """Byte pairs within what `split` cuts out of a text. whole_words: a piece that is a token stays one."""
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=whole_words))
    tokenizer.pre_tokenizer = split_bytes(split)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def split_bytes(split: str) -> pre_tokenizers.PreTokenizer:
    """Cut a text by a regular expression, then write its bytes as printable characters."""
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), bytes_])


def printable_bytes() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: itself, or from U+0100 on."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) if byte in plain else chr(256 + others.index(byte)) for byte in range(256)]


def sentence_pieces(data: bytes) -> dict[str, float]:
    """The pieces of a SentencePiece model in the order of their ids, and their scores.

    The file is a protocol buffer whose field 1 is repeated, one message for each piece: text 1, score 2, kind 3.
    """
    pieces = [dict(_fields(value)) for number, value in _fields(data) if number == 1]
    return {piece[1].decode(): struct.unpack("<f", piece[2])[0] for piece in pieces}


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of one message: integers, or bytes."""
    at = 0
    while at < len(data):
        key, at = _integer(data, at)
        match key & 7:
            case 0:
                value, at = _integer(data, at)
                yield key >> 3, value
            case 2:
                size, at = _integer(data, at)
                yield key >> 3, data[at : at + size]
                at += size
            case kind:
                size = {1: 8, 5: 4}[kind]
                yield key >> 3, data[at : at + size]
                at += size


def _integer(data: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _file(package: str, inside: str) -> Path | None:
    """A file of a package that need not be importable."""
    spec = find_spec(package)
    folders: Sequence[str] = (spec.submodule_search_locations or []) if spec else []
    return next((file for folder in folders if (file := Path(folder) / inside).is_file()), None)


def _tiktoken(file: Path) -> dict[bytes, int]:
    """Lines of a token in base 64 and its rank."""
    lines = (line.split() for line in file.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def byte_level_model(ranks: Mapping[bytes, int]) -> tuple[Vocabulary, Merges]:
    characters = printable_bytes()
    vocabulary = {"".join(characters[byte] for byte in token): rank for token, rank in ranks.items()}
    return vocabulary, _merges(vocabulary)


def _merges(vocabulary: Mapping[str, int]) -> Merges:
    """Every pair of tokens that joins to a token, in the order of what they join to: the earliest is joined first."""
    merges: Merges = []
    for token in sorted(vocabulary, key=vocabulary.__getitem__):
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [pair for pair in cuts if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += sorted(pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges


def _role(tokenizer: Tokenizer, specials: Sequence[str], eos: str, bos: str | None = None) -> RoleTokenizer:
    """With special tokens after the others, or in their places."""
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    if bos is not None:
        ids = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    return RoleTokenizer(tokenizer, {"eos_token": eos}, {"vocab_size": tokenizer.get_vocab_size()})
