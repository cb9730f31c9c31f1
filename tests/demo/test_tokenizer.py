"""The trio's tokenizer and chat template."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cluster.demo import tokenizer as trio_tokenizer
from cluster.demo.task import PEOPLE, RELATIONS, questions
from cluster.demo.tokenizer import END_OF_TEXT, MARKUP, SPECIAL_TOKENS, THINK_END, THINK_START, TURN_END, TURN_START


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return trio_tokenizer.build()


@pytest.fixture(scope="module")
def loaded(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    trio_tokenizer.save(tokenizer, folder)
    return AutoTokenizer.from_pretrained(folder)


def test_the_vocabulary_is_larger_than_a_slice(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == trio_tokenizer.VOCABULARY_SIZE >= 2000
    assert sorted(tokenizer.get_vocab().values()) == list(range(trio_tokenizer.VOCABULARY_SIZE))


def test_building_twice_gives_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    assert trio_tokenizer.build().to_str() == tokenizer.to_str()


def test_the_committed_tokenizers_equal_built_ones(tokenizer: Tokenizer, tmp_path: Path) -> None:
    trio_tokenizer.save(tokenizer, tmp_path)
    weights = Path(trio_tokenizer.__file__).parent / "weights"
    for role in ("target", "guider", "guider_base"):
        assert json.loads((weights / role / "tokenizer.json").read_text()) == json.loads(tokenizer.to_str())
        for name in ("tokenizer_config.json", "chat_template.jinja"):
            assert (weights / role / name).read_text() == (tmp_path / name).read_text()


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n\t x",
        "Who is Ada?",
        "naïve Größe",
        "日本語 と 한국어",
        "\U0001f9d1\u200d\U0001f680\ufeff",
        "\x00\x07\r\n",
        "".join(map(chr, range(0x250))),
    ],
)
def test_any_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("word", [*PEOPLE, *RELATIONS])
def test_names_and_relations_are_one_token_after_a_space(tokenizer: Tokenizer, word: str) -> None:
    assert len(tokenizer.encode(f" {word}").ids) == 1


@pytest.mark.parametrize("token", SPECIAL_TOKENS, ids=str)
def test_special_tokens_are_single_ids(tokenizer: Tokenizer, token: object) -> None:
    content = str(token.content)  # type: ignore[attr-defined]
    middle = tokenizer.encode(f"a{content}b").tokens
    assert middle == ["a", content, "b"]


def test_decoding_keeps_thinking_marks_and_removes_control_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"{THINK_START}a{THINK_END}b{TURN_END}{END_OF_TEXT}").ids
    assert tokenizer.decode(ids) == f"{THINK_START}a{THINK_END}b"


def test_transformers_loads_the_same_tokenizer(tokenizer: Tokenizer, loaded: PreTrainedTokenizerFast) -> None:
    text = MARKUP.prompt(questions("train", 2, 1)[0]) + "naïve \U0001f680"
    assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    assert loaded.decode(tokenizer.encode(text).ids) == text
    assert len(loaded) == trio_tokenizer.VOCABULARY_SIZE
    assert (loaded.eos_token, loaded.pad_token) == (TURN_END, END_OF_TEXT)
    assert loaded.model_max_length == trio_tokenizer.MAX_POSITIONS


def test_the_template_renders_questions_as_in_training(loaded: PreTrainedTokenizerFast) -> None:
    question = questions("train", 3, 1)[0]
    messages = [{"role": "user", "content": question.text}]
    rendered = loaded.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert rendered == MARKUP.prompt(question)


def test_earlier_turns_lose_their_thinking(loaded: PreTrainedTokenizerFast) -> None:
    first, second = questions("train", 2, 2)
    messages = [
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": first.text},
        {"role": "assistant", "content": first.reasoned_answer},
        {"role": "user", "content": second.text},
    ]
    rendered = loaded.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert rendered == (
        f"{TURN_START}system\nAnswer.{TURN_END}\n{TURN_START}user\n{first.text}{TURN_END}\n"
        f"{TURN_START}assistant\n{first.direct_answer}{TURN_END}\n" + MARKUP.prompt(second)
    )


def test_the_last_turn_keeps_its_thinking(loaded: PreTrainedTokenizerFast) -> None:
    question = questions("train", 2, 1)[0]
    messages = [{"role": "user", "content": question.text}, {"role": "assistant", "content": question.reasoned_answer}]
    rendered = loaded.apply_chat_template(messages, tokenize=False)
    assert rendered == f"{MARKUP.prompt(question)}{question.reasoned_answer}{TURN_END}\n"
