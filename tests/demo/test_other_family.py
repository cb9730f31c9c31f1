"""The target of another family: its tokenizer, its chat format, its training and its committed weights."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from rich.progress import Progress
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.text.tokenizer import RoleTokenizer
from cluster.demo import other_tokenizer
from cluster.demo import tokenizer as trio_tokenizer
from cluster.demo.accuracy import Term, accuracy
from cluster.demo.lessons import Curriculum, DocumentPacker
from cluster.demo.other_tokenizer import MARKUP, TURN_END
from cluster.demo.task import PEOPLE, RELATIONS, questions, table
from cluster.demo.train import WEIGHTS, Recipe, Schedule, train_other, write

FOLDER = WEIGHTS / "target_other"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return other_tokenizer.build()


def test_the_committed_tokenizer_equals_a_built_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    other_tokenizer.save(tokenizer, tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (FOLDER / file.name).read_bytes(), file.name


def test_any_text_round_trips(tokenizer: Tokenizer) -> None:
    text = "Who  is naïve? \U0001f680 <think>12</think>\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_text_tokens_differ_from_the_trios(tokenizer: Tokenizer) -> None:
    trio = trio_tokenizer.build()
    for word in PEOPLE + RELATIONS:
        assert len(tokenizer.encode(f" {word}").ids) == len(trio.encode(f" {word}").ids) == 1
    assert len(trio.encode("<think>").ids) == 1
    assert len(tokenizer.encode("<think>").ids) > 3
    assert trio.encode("The mentor of Ada is").ids != tokenizer.encode("The mentor of Ada is").ids


def test_the_other_template_renders_questions_as_in_training() -> None:
    role, question = RoleTokenizer.load(str(FOLDER)), questions("train", 2, 1)[0]
    assert role.render([{"role": "user", "content": question.text}]) == MARKUP.prompt(question)
    answered = [{"role": "user", "content": question.text}, {"role": "assistant", "content": question.direct_answer}]
    whole = role.render(answered, add_generation_prompt=False)
    assert whole == MARKUP.prompt(question) + question.direct_answer + TURN_END
    loaded = AutoTokenizer.from_pretrained(FOLDER)
    assert loaded.apply_chat_template(answered, tokenize=False) == whole
    assert role.eos_ids[0] == role.added_tokens[TURN_END]


def test_pieces_meet_at_token_boundaries(tokenizer: Tokenizer) -> None:
    lesson = Curriculum(tuple(table().values()), 0.3, 0.5, 4, MARKUP)
    ids, _ = DocumentPacker(tokenizer, lesson).row(random.Random(3), 200)
    draw, whole = random.Random(3), ""
    while len(tokenizer.encode(whole).ids) < 200:
        whole += "".join(piece.text for piece in lesson.document(draw))
    assert ids == tokenizer.encode(whole).ids[:200]


def test_the_longest_reply_fits_its_budget(tokenizer: Tokenizer) -> None:
    for markup, each in ((MARKUP, tokenizer), (trio_tokenizer.MARKUP, trio_tokenizer.build())):
        for hops in (1, 3, 5):
            lengths = [
                len(each.encode(question.reasoned_answer + markup.turn_end).ids)
                for question in questions("held_out", hops, 20)
            ]
            assert max(lengths) <= markup.budget(hops)


def test_the_same_recipe_gives_the_same_weights(tmp_path: Path) -> None:
    short = replace(Recipe(), target_other=Schedule(seed=4, steps=3, rate=1e-3, rows=2, length=40))
    for run in ("first", "second"):
        with Progress(disable=True) as progress:
            model, _ = train_other(short, progress)
        write(model, tmp_path / run, lambda folder: None)
    first, second = (tmp_path / run / "model.safetensors" for run in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_the_other_target_knows_the_facts_and_answers_at_once(tokenizer: Tokenizer) -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert model.config.vocab_size == tokenizer.get_vocab_size()
    asked = questions("held_out", 3, 40)
    assert accuracy([Term(model)], tokenizer, asked, markup=MARKUP) < 0.4
    assert accuracy([Term(model)], tokenizer, asked, "<think>", MARKUP) > 0.95
