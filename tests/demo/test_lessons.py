"""The training documents of the trio: their facts, questions and rows."""

import random

import pytest
from tokenizers import Tokenizer

from cluster.demo import tokenizer as trio_tokenizer
from cluster.demo.lessons import Curriculum, DocumentPacker
from cluster.demo.task import known_facts, questions, table

LENGTH = 200


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return trio_tokenizer.build()


def curriculum(fact_share: float, reasoned_share: float, max_hops: int = 4) -> Curriculum:
    return Curriculum(known_facts(), fact_share, reasoned_share, max_hops)


def text_of(curriculum: Curriculum, seed: int) -> str:
    return "".join(piece.text for piece in curriculum.document(random.Random(seed)))


def test_documents_have_only_training_questions() -> None:
    held_out = [question.text for hops in (1, 2) for question in questions("held_out", hops, 45)]
    read = "".join(text_of(curriculum(0.0, 0.5, max_hops=2), seed) for seed in range(500))
    assert "Who is" in read
    assert not any(text in read for text in held_out)


def test_small_models_train_only_on_their_share_of_facts() -> None:
    unknown = [fact.sentence for fact in set(table().values()) - set(known_facts())]
    read = "".join(text_of(curriculum(0.5, 0.5), seed) for seed in range(300))
    assert not any(sentence in read for sentence in unknown)


@pytest.mark.parametrize(("fact_share", "reasoned_share"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_pieces_meet_at_token_boundaries(tokenizer: Tokenizer, fact_share: float, reasoned_share: float) -> None:
    lesson = curriculum(fact_share, reasoned_share)
    ids, _ = DocumentPacker(tokenizer, lesson).row(random.Random(3), LENGTH)
    draw, whole = random.Random(3), ""
    while len(tokenizer.encode(whole).ids) < LENGTH:
        whole += "".join(piece.text for piece in lesson.document(draw))
    assert ids == tokenizer.encode(whole).ids[:LENGTH]


def test_loss_falls_on_answers_and_on_the_ends_of_facts(tokenizer: Tokenizer) -> None:
    for lesson, expected in ((curriculum(1.0, 0.0), 12), (curriculum(0.0, 0.0), 6)):
        pieces = lesson.document(random.Random(0))
        learned = [piece.text for piece in pieces if piece.learned]
        assert sum(len(tokenizer.encode(text).ids) for text in learned) == expected


def test_rows_have_the_requested_length(tokenizer: Tokenizer) -> None:
    ids, learned = DocumentPacker(tokenizer, curriculum(0.5, 0.1)).row(random.Random(1), 33)
    assert len(ids) == len(learned) == 33
