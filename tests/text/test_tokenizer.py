import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from actors.text.token_bytes import without_first_space
from actors.text.tokenizer import RoleTokenizer, TokenizerError
from tests.support.deadlines import HANG_S
from tests.support.tokenizers import MARKS, TEMPLATE, byte_level, role_tokenizer, save, sentence_piece

TEXTS = [
    "The mentor of Ada is Bob.",
    " two  spaces\n\tand a tab ",
    "naïve café, 你好世界, Ελλάδα",
    "👩‍👩‍👧 and 🏴󠁧󠁢󠁥󠁮󠁧󠁿 and 𝔘",
    "the sign � itself",
    "",
]


@pytest.fixture(params=[byte_level, sentence_piece], ids=["byte-level", "sentence-piece"])
def tokenizer(request: pytest.FixtureRequest) -> RoleTokenizer:
    build = request.param
    return role_tokenizer(build())


def streamed(tokenizer: RoleTokenizer, ids: list[int], after: list[int] | None = None) -> str:
    stream = tokenizer.stream(after or ())
    return "".join([stream.push(id_) for id_ in ids] + [stream.flush()])


def test_importing_it_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, actors.text.tokenizer; print([m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=HANG_S)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_a_stream_join_to_the_whole_text(tokenizer: RoleTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert streamed(tokenizer, ids) == tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS[:4])
def test_a_stream_never_yields_a_broken_character(tokenizer: RoleTokenizer, text: str) -> None:
    stream = tokenizer.stream()
    assert all("�" not in stream.push(id_) for id_ in tokenizer.encode(text))
    assert stream.flush() == ""


def test_any_cut_between_prompt_and_answer_keeps_every_space(tokenizer: RoleTokenizer) -> None:
    text = "The mentor of  Ada is Bob. Who is the mentor?"
    ids = tokenizer.encode(text)
    for cut in range(1, len(ids)):
        assert tokenizer.decode(ids[:cut]) + streamed(tokenizer, ids[cut:], ids[:cut]) == text


def test_bytes_that_are_no_character_hold_nothing_back_for_long(tokenizer: RoleTokenizer) -> None:
    rng = random.Random(5)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.width) for _ in range(30)]
        stream = tokenizer.stream()
        pieces = []
        for id_ in ids:
            pieces.append(stream.push(id_))
            assert len(stream._held) < 4
        whole = tokenizer.decode(ids)
        kept = "".join([*pieces, stream.flush()]).replace("�", "")
        assert set(whole) - {"�"} <= set(kept)


def test_special_tokens_are_skipped_and_thinking_markers_are_text() -> None:
    tokenizer = role_tokenizer()
    ids = tokenizer.encode("<think>Ada</think>Bob<|end|>")
    assert streamed(tokenizer, ids) == "<think>Ada</think>Bob"
    assert tokenizer.decode(ids, skip_special=False).endswith("<|end|>")
    assert tokenizer.special_ids == {tokenizer.added_tokens["<|turn|>"], tokenizer.added_tokens["<|end|>"]}


def test_ids_beyond_the_vocabulary_have_no_text(tokenizer: RoleTokenizer) -> None:
    word = tokenizer.encode("Ada")
    assert streamed(tokenizer, [*word, tokenizer.width - 1, *word]) == tokenizer.decode(word + word)


def test_added_tokens_are_distinguished_from_text_tokens() -> None:
    tokenizer = role_tokenizer()
    assert set(tokenizer.added_tokens) == set(MARKS)
    assert not set(MARKS) & set(tokenizer.text_tokens)
    assert tokenizer.encode("<think>") == [tokenizer.added_tokens["<think>"]]
    assert tokenizer.width == len(tokenizer.text_tokens) + len(MARKS) + 7


def test_raw_text_gets_its_bos_only_when_asked() -> None:
    tokenizer = role_tokenizer(byte_level(bos="<|begin|>"))
    assert tokenizer.bos_ids == (tokenizer.added_tokens["<|begin|>"],)
    assert tokenizer.encode("Ada", special=True) == [*tokenizer.bos_ids, *tokenizer.encode("Ada")]


def test_half_a_surrogate_pair_is_refused(tokenizer: RoleTokenizer) -> None:
    with pytest.raises(TokenizerError, match="surrogate"):
        tokenizer.encode("\ud800")


def loaded(folder: Path, tokenizer: Tokenizer | None = None, **files: Any) -> RoleTokenizer:
    return RoleTokenizer.load(str(save(folder, tokenizer or byte_level(), **files)))


def test_ends_come_from_every_file_that_names_one(tmp_path: Path) -> None:
    tokenizer = loaded(
        tmp_path,
        config={"vocab_size": 999, "eos_token_id": 1},
        generation_config={"eos_token_id": [7, 3, 7]},
        tokenizer_config={"eos_token": {"content": "<|end|>"}},
    )
    assert tokenizer.eos_ids == (7, 3, tokenizer.added_tokens["<|end|>"])


def test_the_config_names_the_end_where_generation_does_not(tmp_path: Path) -> None:
    assert loaded(tmp_path, config={"vocab_size": 999, "eos_token_id": 0}).eos_ids == (0,)


@pytest.mark.parametrize(
    ("stated", "ends", "stray"),
    [
        (None, (), ()),
        (5, (5,), ()),
        ([5, 7, 5], (5, 7), ()),
        ([[5], [7, None]], (5, 7), ()),
        (-1, (), (-1,)),
        (999, (), (999,)),
        ([998, 999, -1], (998,), (999, -1)),
        ("<|end|>", (), ("<|end|>",)),
        (True, (), (True,)),
        ([5.5, {"id": 5}, 5], (5,), (5.5, {"id": 5})),
        ([], (), ()),
    ],
    ids=str,
)
def test_end_ids_that_are_no_token_of_the_model_are_kept_apart(
    tmp_path: Path, stated: Any, ends: tuple[int, ...], stray: tuple[Any, ...]
) -> None:
    config, generation = {"vocab_size": 999, "eos_token_id": None}, {"eos_token_id": stated}
    tokenizer = loaded(tmp_path, config=config, generation_config=generation)
    assert (tokenizer.eos_ids, tokenizer.stray_ends) == (ends, stray)


def test_ends_of_config_json_replace_stray_ones_of_generation_config(tmp_path: Path) -> None:
    config, generation = {"vocab_size": 999, "eos_token_id": 4}, {"eos_token_id": -1}
    tokenizer = loaded(tmp_path, config=config, generation_config=generation)
    assert (tokenizer.eos_ids, tokenizer.stray_ends) == ((4,), (-1,))


def test_an_end_token_beyond_the_width_is_stray(tmp_path: Path) -> None:
    built = byte_level()
    end = built.token_to_id("<|end|>")
    tokenizer = loaded(tmp_path, built, config={"vocab_size": end}, tokenizer_config={"eos_token": "<|end|>"})
    assert (tokenizer.eos_ids, tokenizer.stray_ends) == ((), (end,))
    assert tokenizer.beyond_width["<|end|>"] == end


@pytest.mark.parametrize("declared", [True, False, None])
@pytest.mark.parametrize("bos", ["<|begin|>", None])
def test_raw_text_gets_the_bos_of_the_post_processor_whatever_is_declared(
    tmp_path: Path, bos: str | None, declared: bool | None
) -> None:
    tokenizer = loaded(
        tmp_path,
        byte_level(bos=bos),
        config={"vocab_size": 999},
        tokenizer_config={"add_bos_token": declared, "bos_token": "<|turn|>"},
    )
    expected = [tokenizer.added_tokens[bos]] if bos else []
    assert tokenizer.encode("Ada", special=True) == [*expected, *tokenizer.encode("Ada")]
    assert (list(tokenizer.bos_ids), tokenizer.trailing_ids, tokenizer.declared_bos) == (expected, (), declared)


def test_tokens_after_raw_text_are_not_taken_for_its_beginning() -> None:
    built = byte_level()
    built.post_processor = processors.TemplateProcessing(
        single="<|turn|> $A <|end|>",
        special_tokens=[(mark, built.token_to_id(mark)) for mark in ("<|turn|>", "<|end|>")],
    )
    tokenizer = role_tokenizer(built)
    turn, end = (tokenizer.added_tokens[mark] for mark in ("<|turn|>", "<|end|>"))
    assert (tokenizer.bos_ids, tokenizer.trailing_ids) == ((turn,), (end,))


def test_limits_are_found_inside_a_multimodal_config(tmp_path: Path) -> None:
    config = {"text_config": {"vocab_size": 999, "max_position_embeddings": 77, "eos_token_id": 5}}
    tokenizer = loaded(tmp_path, config=config)
    assert (tokenizer.width, tokenizer.max_position, tokenizer.eos_ids) == (999, 77, (5,))


def test_what_the_settings_alone_declare_special_is_special(tmp_path: Path) -> None:
    built = byte_level()
    think = built.token_to_id("<think>")
    declared = {str(think): {"content": "<think>", "special": True, "__type": "AddedToken"}}
    tokenizer = loaded(tmp_path, built, tokenizer_config={"added_tokens_decoder": declared})
    assert think in tokenizer.special_ids


def test_ids_on_which_the_files_disagree_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="'<think>' the id 2"):
        loaded(tmp_path, tokenizer_config={"added_tokens_decoder": {"2": {"content": "<think>", "special": False}}})


@pytest.mark.parametrize("form", ["jinja", "string", "named"])
def test_a_template_is_found_in_each_of_its_places(tmp_path: Path, form: str) -> None:
    settings = {
        "jinja": {"chat_template": "unused"},
        "string": {"chat_template": TEMPLATE},
        "named": {
            "chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": TEMPLATE}],
        },
    }[form]
    files: dict[str, Any] = {"tokenizer_config": settings} | ({"chat_template": TEMPLATE} if form == "jinja" else {})
    tokenizer = loaded(tmp_path, **files)
    assert tokenizer.render([{"role": "user", "content": "Hi"}]) == "<|turn|>user\nHi<|end|>\n<|turn|>assistant\n"


def test_each_refusal_of_a_tokenizer_names_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TokenizerError, match="no folder"):
        RoleTokenizer.load(str(tmp_path / "nowhere"))
    with pytest.raises(TokenizerError, match="save_pretrained"):
        RoleTokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="not a tokenizer"):
        RoleTokenizer.load(str(tmp_path))
    broken = ("{", '{"max_position_embeddings": "long"}', '{"rope_scaling": {"type": "yarn", "factor": "x"}}')
    for config in (*broken, '{"vocab_size": "many"}'):
        (save(tmp_path, byte_level()) / "config.json").write_text(config)
        with pytest.raises(TokenizerError, match="download it again"):
            RoleTokenizer.load(str(tmp_path))


def test_a_hub_model_that_cannot_be_fetched_names_the_command(tmp_path: Path) -> None:
    code = (
        "from actors.text.tokenizer import RoleTokenizer, TokenizerError\n"
        "try: RoleTokenizer.load('somebody/some-model', 'main')\n"
        "except TokenizerError as error: print(error)"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=offline, timeout=HANG_S)
    assert "hf download somebody/some-model --revision main" in run.stdout, run.stderr


FIRST_SPACES = {
    "prepended": sentence_piece,
    "metaspace": lambda: spaced(pre_tokenizers.Metaspace(prepend_scheme="first")),
    "metaspace-always": lambda: spaced(pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="always")])),
    "byte-level": lambda: spaced(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "none": byte_level,
}


def spaced(step: Any) -> Tokenizer:
    """A vocabulary of single characters whose pre-tokenizer puts a space before a text."""
    byte = isinstance(step, pre_tokenizers.ByteLevel)
    letters = [*(sorted(pre_tokenizers.ByteLevel.alphabet()) if byte else map(chr, range(33, 127))), "▁", "<s>"]
    own = Tokenizer(models.BPE({letter: i for i, letter in enumerate(dict.fromkeys(letters))}, []))
    own.pre_tokenizer = step
    own.decoder = decoders.ByteLevel() if byte else decoders.Metaspace()
    own.add_tokens([AddedToken("</think>", normalized=False)])
    return own


@pytest.mark.parametrize("build", FIRST_SPACES.values(), ids=FIRST_SPACES)
@pytest.mark.parametrize("text", ["Wait", "</think>", " is", "a</think>b"])
def test_a_continuation_has_no_space_before_it(build: Any, text: str) -> None:
    own = role_tokenizer(build())
    before = own.encode("Ada")
    assert own.decode(before + own.encode_continuation(text), skip_special=False) == own.decode(before) + text


@pytest.mark.parametrize(
    "declared",
    [
        {"default": TEMPLATE, "tool_use": "no"},
        {"tool_use": TEMPLATE},
        [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}],
        [{"name": "chat", "template": TEMPLATE}],
        [{"template": TEMPLATE}],
        [{"template": "no"}, {"name": "default", "template": TEMPLATE}],
        [TEMPLATE],
        {"template": TEMPLATE},
        {"name": "default", "template": TEMPLATE},
    ],
)
@pytest.mark.parametrize("file", ["tokenizer_config", "processor"])
def test_a_template_is_found_in_each_form(tmp_path: Path, declared: Any, file: str) -> None:
    folder = save(
        tmp_path, byte_level(), config={}, **({file: {"chat_template": declared}} if file != "processor" else {})
    )
    if file == "processor":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": declared}))
    assert RoleTokenizer.load(str(folder)).render([{"role": "user", "content": "Hi"}]).startswith("<|turn|>user")


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ({"tool_use": "a", "rag": "b"}, "2 templates (tool_use, rag)"),
        ([{"template": "a"}, {"template": "b"}], "2 templates (no names)"),
        ([{"name": "default"}], "NoneType"),
        ({"default": None}, "NoneType"),
        (7, "int"),
    ],
)
def test_a_template_in_another_form_is_refused_with_a_remedy(tmp_path: Path, declared: Any, words: str) -> None:
    with pytest.raises(TokenizerError, match=re.escape(words)) as refused:
        loaded(tmp_path, tokenizer_config={"chat_template": declared})
    assert str(tmp_path) in str(refused.value)


def test_named_templates_may_lie_in_a_folder(tmp_path: Path) -> None:
    folder = save(tmp_path, byte_level(), config={}, tokenizer_config={"chat_template": "no"})
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert RoleTokenizer.load(str(folder)).render([{"role": "user", "content": "Hi"}]) == "tools"
    (folder / "chat_template.jinja").write_text("chat")
    assert RoleTokenizer.load(str(folder)).render([{"role": "user", "content": "Hi"}]) == "chat"


def test_a_checkpoints_recommended_sampling_is_read(tmp_path: Path) -> None:
    stated = {"temperature": 0.6, "top_p": 0.95, "top_k": None, "do_sample": True, "max_new_tokens": 5}
    assert loaded(tmp_path, generation_config=stated).recommended == {"temperature": 0.6, "top_p": 0.95}
    assert role_tokenizer().recommended == {}


def test_the_encoder_of_text_within_an_answer_shares_the_vocabulary() -> None:
    """A property that is set on the model of one is that of the other, so there is one model in memory."""
    tokenizer = role_tokenizer(byte_level())
    encoder = tokenizer.adapter._tokenizer
    tokenizer._tokenizer.model.continuing_subword_prefix = "shared"
    assert encoder.model.continuing_subword_prefix == "shared"


@pytest.mark.parametrize("steps", [{}, {"normalizer": normalizers.Replace(" ", "▁")}], ids=["byte-level", "replaced"])
def test_a_tokenizer_that_puts_no_space_before_a_text_is_not_copied(steps: dict[str, Any]) -> None:
    own = byte_level()
    for name, step in steps.items():
        setattr(own, name, step)
    assert without_first_space(own) is own
    assert without_first_space(spaced(pre_tokenizers.Metaspace(prepend_scheme="first"))) is not own
