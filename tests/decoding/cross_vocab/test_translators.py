"""Ends of texts and thinking markers across vocabularies, with models of given probabilities."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import pytest
from tokenizers import Tokenizer

from actors.decoding.candidates import Floats
from actors.decoding.cross_vocab.translators import Alignment, RetokenizingTranslator
from actors.decoding.stream import Stream
from actors.text.alignment_cache import align
from actors.text.tokenizer import RoleTokenizer
from benchmarks.aligned import AlignedModel, difference
from tests.support.tokenizers import byte_level, role_tokenizer, sentence_piece

END = "</think>"
TARGET = role_tokenizer(sentence_piece(), bos_token="<s>", eos_token="</s>")
GUIDER = RoleTokenizer(
    byte_level(("</think>", "<|end|>", "<think>", "<|stop|>")),
    {"eos_token": "<|end|>"},
    {"vocab_size": 320},
    {"eos_token_id": [301, 303]},
)
BASE = role_tokenizer(byte_level(("<|end|>", "<|turn|>")))


def saying(shares: Mapping[int, float], width: int) -> Floats:
    """Logits of a model with these probabilities of tokens; all others share the rest equally."""
    row = np.full(width, np.log((1 - sum(shares.values())) / (width - len(shares))))
    for token, share in shares.items():
        row[token] = np.log(share)
    return row


@pytest.fixture(scope="module")
def pair() -> Alignment:
    return align(TARGET, GUIDER)


def test_all_ids_that_end_a_text_are_one_event(pair: Alignment) -> None:
    assert set(GUIDER.eos_ids) == {GUIDER.added_tokens["<|end|>"], GUIDER.added_tokens["<|stop|>"]}
    row = saying(dict.fromkeys(GUIDER.eos_ids, 0.3), GUIDER.width)
    model = AlignedModel(pair, lambda tokens: row)
    assert np.isclose(np.exp(model.masses()[TARGET.eos_ids[0]]), 0.6)
    model.push(TARGET.eos_ids[0])
    assert model.stream.tokens == [GUIDER.eos_ids[0]]


def test_an_end_that_is_text_to_the_target_is_guided_token_by_token(pair: Alignment) -> None:
    wish = GUIDER.added_tokens[END]
    row, base_row = saying({wish: 0.9}, GUIDER.width), saying({}, BASE.width)
    guider, base = AlignedModel(pair, lambda tokens: row), AlignedModel(align(TARGET, BASE), lambda tokens: base_row)
    encoded = TARGET.adapter.encode(END)[0]
    assert len(encoded) > 3, "several pieces, so that its later ones are straddled"
    for piece in encoded[:3]:
        delta = difference(guider.masses(), base.masses())
        assert int(delta.argmax()) == piece
        assert delta[piece] > 1
        guider.push(piece)
        base.push(piece)


def test_the_guiders_marker_replaces_its_text(pair: Alignment) -> None:
    streams = Stream(3, [1, 2]), Stream(3, [1, 2])
    translators = RetokenizingTranslator(pair, streams[0]), RetokenizingTranslator(align(TARGET, BASE), streams[1])
    encoded = TARGET.adapter.encode("Ada." + END)[0]
    for translator in translators:
        for token in encoded:
            translator.append(token)
    translators[0].retokenize(TARGET.encode(END), [GUIDER.added_tokens[END]], END)
    translators[1].retokenize(TARGET.encode(END), BASE.encode(END), END)
    assert streams[0].tokens[2:] == [*GUIDER.adapter.encode("Ada.")[0], GUIDER.added_tokens[END]]
    assert streams[1].tokens[2:] == BASE.adapter.encode("Ada." + END)[0]


def test_drafts_are_encoded_together_with_the_text_before(pair: Alignment) -> None:
    translator = RetokenizingTranslator(pair, Stream(3, [1]))
    whole = TARGET.adapter.encode("The mentor of Ada is")[0]
    said, rest = whole[:2], b"".join(TARGET.adapter.texts[token] or b"" for token in whole[2:]).decode()
    for token in said:
        translator.append(token)
    assert translator.drafts_in_target([*GUIDER.adapter.encode(rest)[0], GUIDER.eos_ids[1], 5]) == [
        *whole[2:],
        TARGET.eos_ids[0],
    ]


def test_permuted_ids_of_the_small_model_change_no_event() -> None:
    order = np.random.default_rng(3).permutation(len(GUIDER.text_tokens))
    moved = {token: int(order[id_]) for token, id_ in GUIDER.text_tokens.items()}
    spec = json.loads(byte_level(("</think>", "<|end|>", "<think>", "<|stop|>")).to_str())
    spec["model"]["vocab"] = dict(sorted(moved.items(), key=lambda entry: entry[1]))
    settings = {"eos_token": "<|end|>"}, {"vocab_size": 320}, {"eos_token_id": [301, 303]}
    permuted = RoleTokenizer(Tokenizer.from_str(json.dumps(spec)), *settings)
    row = np.random.default_rng(1).normal(size=320)
    other = row.copy()
    other[order] = row[: len(order)]
    one, two = (
        AlignedModel(align(TARGET, GUIDER), lambda tokens: row),
        AlignedModel(align(TARGET, permuted), lambda tokens: other),
    )
    for token in TARGET.adapter.encode("The mentor of Ada is Bob. 漢")[0]:
        assert np.allclose(one.masses(), two.masses(), equal_nan=True)
        one.push(token)
        two.push(token)
