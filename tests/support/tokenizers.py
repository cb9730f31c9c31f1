"""Small tokenizers of the supported families, built in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from actors.text.tokenizer import RoleTokenizer

TEXT = "The mentor of Ada is Bob. The rival of Bob is Eve. Who is the mentor of the rival of Ada? user assistant system"

TEMPLATE = """\
{%- for tool in tools or [] %}{{- '<|turn|>system\\n' + (tool.function | tojson) + '<|end|>\\n' }}{% endfor %}
{%- for message in messages %}
{%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}{{ raise_exception('no such role') }}{% endif %}
{%- set content = message.content %}
{%- if message.role == 'assistant' and not loop.last %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- '<|turn|>' + message.role + '\\n' + content }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
{{- (call.function.arguments | tojson) + '}</tool_call>' }}
{%- endfor %}
{{- '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}"""

MARKS = ("<|turn|>", "<|end|>", "<think>", "</think>")


def byte_level(marks: tuple[str, ...] = MARKS, bos: str | None = None) -> Tokenizer:
    """Byte-level BPE, as in Qwen and Llama 3; the marks get their ids in the order given."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    tokenizer.add_tokens([AddedToken(mark, special="|" in mark, normalized=False) for mark in marks])
    if bos is not None:
        tokenizer.add_special_tokens([bos])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def sentence_piece() -> Tokenizer:
    """BPE with byte fallback and a space before the first word, as in Llama 2."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([TEXT.replace(" ", " ")] * 4, trainer)
    # The byte tokens are part of the model; only the first three are added tokens.
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]
    return Tokenizer.from_str(json.dumps(spec))


def role_tokenizer(
    tokenizer: Tokenizer | None = None, template: str | None = TEMPLATE, max_position: int | None = 512, **more: Any
) -> RoleTokenizer:
    """A role's tokenizer without files."""
    own = tokenizer or byte_level()
    config = {"vocab_size": own.get_vocab_size() + 7, "max_position_embeddings": max_position}
    return RoleTokenizer(own, {"eos_token": "<|end|>"} | more, config, None, template)


def save(folder: Path, tokenizer: Tokenizer, **files: Any) -> Path:
    """A checkpoint folder without weights: JSON files by their stem, `chat_template` as text."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if template := files.pop("chat_template", None):
        (folder / "chat_template.jinja").write_text(template)
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    return folder
