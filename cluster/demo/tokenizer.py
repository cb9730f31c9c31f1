"""The tokenizer of the embedded trio: byte-level BPE, special tokens and a ChatML-like chat template.

It is built from text of this package: common English, and sentences of the task, repeated so that each name and each
relation becomes one token. Every byte is a token, so that any UTF-8 text can be encoded and decoded.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from cluster.demo import english, task
from cluster.demo.markup import Markup

VOCABULARY_SIZE = 2048
MAX_POSITIONS = 4096

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
THINK_START, THINK_END = "<think>", "</think>"

MARKUP = Markup(
    question=f"{TURN_START}user\n",
    answer=f"{TURN_END}\n{TURN_START}assistant\n",
    turn_end=TURN_END,
    after="\n",
    end_of_text=END_OF_TEXT,
    tokens_a_hop=7,
    tokens_around=12,
)

# As in the published families, decoding removes control tokens and keeps the marks of thinking.
SPECIAL_TOKENS = (
    AddedToken(END_OF_TEXT, special=True, normalized=False),
    AddedToken(TURN_START, special=True, normalized=False),
    AddedToken(TURN_END, special=True, normalized=False),
    AddedToken(THINK_START, special=False, normalized=False),
    AddedToken(THINK_END, special=False, normalized=False),
)

MARKS: Mapping[str, object] = {
    "bos_token": None,
    "eos_token": TURN_END,
    "pad_token": END_OF_TEXT,
    "additional_special_tokens": [TURN_START],
}

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- set content = message['content'] %}
    {%- if message['role'] == 'assistant' and not loop.last %}
        {%- set content = content.split('</think>')[-1] %}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def build() -> Tokenizer:
    """The tokenizer, the same at every call: 2,043 byte-level BPE entries, then the five special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens(list(SPECIAL_TOKENS))
    if tokenizer.get_vocab_size() != VOCABULARY_SIZE:
        raise RuntimeError(f"the corpus yields {tokenizer.get_vocab_size()} tokens, {VOCABULARY_SIZE} are needed")
    return tokenizer


def save(
    tokenizer: Tokenizer, folder: Path, marks: Mapping[str, object] = MARKS, chat_template: str = CHAT_TEMPLATE
) -> None:
    """Write a tokenizer with its marks and chat template in Hugging Face layout into the existing `folder`."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **marks,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(chat_template)


def corpus() -> Iterator[str]:
    """Text for tokenizers: words of the task with and without a leading space, much more often than common words."""
    facts = list(task.table().values())
    for _ in range(4):
        yield from (fact.sentence for fact in facts)
        yield from (f"Who is the {fact.relation} of the {fact.relation} of {fact.person}?" for fact in facts)
        yield from (f"The answer is {fact.value}. The {fact.relation}" for fact in facts)
        yield from task.PEOPLE + task.RELATIONS
        yield from ("system", "user", "assistant")
    words = english.COMMON_WORDS.split()
    for _ in range(2):
        yield from (f" {word}" for word in words)
        yield from (word.capitalize() for word in words)
        yield from english.SENTENCES
