"""A tokenizer of another family for the embedded task, in the style of SentencePiece as used by Llama 2.

It has byte pairs after `▁`, bytes for characters that the text lacks and its own chat template. The marks of thinking
are plain text to it. It is built from the same text as the trio's tokenizer.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from cluster.demo import tokenizer as trio_tokenizer
from cluster.demo.markup import Markup
from cluster.demo.tokenizer import VOCABULARY_SIZE, corpus

UNKNOWN, TEXT_START, TEXT_END = "<unk>", "<s>", "</s>"
USER, ASSISTANT, TURN_END = "<|user|>", "<|assistant|>", "<|end|>"
MARKUP = Markup(
    f"{TEXT_START}{USER}", f"{TURN_END}{ASSISTANT}", TURN_END, "", TEXT_END, tokens_a_hop=7, tokens_around=18
)

MARKS = {
    "bos_token": TEXT_START,
    "eos_token": TURN_END,
    "unk_token": UNKNOWN,
    "pad_token": TEXT_END,
    "additional_special_tokens": [USER, ASSISTANT],
}

CHAT_TEMPLATE = """\
{{- '<s>' }}
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_CHARACTERS = [chr(code) for code in range(0x21, 0x7F)]


def build() -> Tokenizer:
    """The tokenizer, the same at every call: three marks, 256 bytes, byte pairs, then three marks of turns."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, byte_fallback=True))
    # SentencePiece never joins letters with other characters.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="never"), pre_tokenizers.Punctuation("contiguous")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    marks = [UNKNOWN, TEXT_START, TEXT_END]
    turns = [AddedToken(mark, special=True, normalized=False) for mark in (USER, ASSISTANT, TURN_END)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(turns),
        special_tokens=[*marks, *_BYTES],
        initial_alphabet=_CHARACTERS,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in _BYTES]  # they are text
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.add_tokens(turns)
    if tokenizer.get_vocab_size() != VOCABULARY_SIZE:
        raise RuntimeError(f"the corpus yields {tokenizer.get_vocab_size()} tokens, {VOCABULARY_SIZE} are needed")
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer` with its settings and chat template in Hugging Face layout into the existing `folder`."""
    trio_tokenizer.save(tokenizer, folder, MARKS, CHAT_TEMPLATE)
