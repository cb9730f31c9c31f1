"""Maps between vocabularies, built from tokenizers."""

from __future__ import annotations

from functools import cache

import pytest
from tokenizers import Tokenizer, models

from actors.api.generation import ROLES, Role
from actors.api.sampling_params import Thinking
from actors.text.token_bytes import UnsupportedTokenizer
from actors.text.tokenizer import RoleTokenizer
from actors.text.vocabularies import VocabularyRegistry
from tests.support.tokenizers import MARKS, byte_level, role_tokenizer, sentence_piece

END = "</think>"
SMALL: tuple[Role, ...] = ("guider", "guider_base")


@cache
def plain() -> RoleTokenizer:
    """A tokenizer without tokens for thinking; two of its tokens end an answer."""
    return RoleTokenizer(byte_level(MARKS[:2]), {"eos_token": "<|end|>"}, {"vocab_size": 400}, {"eos_token_id": ENDS})


@cache
def thinks() -> RoleTokenizer:
    return role_tokenizer(byte_level(("</think>", "<|end|>", "<think>", "<|turn|>")))


_added = role_tokenizer(byte_level(MARKS[:2])).added_tokens
ENDS = [_added["<|end|>"], _added["<|turn|>"]]


def vocabularies(target: RoleTokenizer | None = None, small: RoleTokenizer | None = None) -> VocabularyRegistry:
    return VocabularyRegistry({"target": target or plain(), **dict.fromkeys(SMALL, small or thinks())})


def test_all_end_ids_stand_for_the_first() -> None:
    built = vocabularies()
    assert [built.canonical("target", i) for i in (*ENDS, 5)] == [ENDS[0], ENDS[0], 5]
    assert ENDS[0] in built.legal("target")
    assert ENDS[1] not in built.legal("target")


def test_legal_ids_are_those_of_the_vocabulary() -> None:
    tokens = {*plain().text_tokens.values(), *plain().added_tokens.values()}
    assert vocabularies().legal("target") == tokens - {ENDS[1]}


def test_each_role_maps_from_itself_and_small_ones_from_the_target() -> None:
    built = vocabularies()
    assert built.plain_map("target", "guider").tokens(ENDS[0]) == (thinks().added_tokens["<|end|>"],)
    assert built.plain_map("guider", "guider").tokens(7) == (7,)


def test_the_guiders_marker_token_counts_for_the_targets_first_token() -> None:
    groups = vocabularies().required("target", "guider", END)
    first = plain().encode(END)[0]
    assert groups.events.tolist() == [ENDS[0], first]
    their_first = thinks().text_tokens["<"]
    assert groups.ids.tolist() == [thinks().added_tokens["<|end|>"], their_first, thinks().added_tokens[END]]


def test_only_end_ids_are_folded_in_the_target_and_without_an_end_text() -> None:
    built = vocabularies()
    assert built.required("target", "target", END).ids.tolist() == ENDS
    assert built.required("target", "guider", "").events.tolist() == [ENDS[0]]
    assert built.required("target", "guider", "no token of anyone").events.tolist() == [ENDS[0]]


def test_forced_ids_are_required_besides_the_folded_events() -> None:
    built = vocabularies()
    letter = plain().text_tokens["A"]
    assert built.required("target", "guider", "", (letter,)).ids.tolist() == [
        thinks().added_tokens["<|end|>"],
        thinks().text_tokens["A"],
    ]


def test_the_cache_of_client_texts_is_bounded() -> None:
    built = vocabularies()
    before = built.plain_map("target", "guider").folds.copy()
    for i in range(600):
        thinking = Thinking(start="<think>", end=f"</think {i}>")
        built.vocabulary("target", ROLES, thinking)
        for role in ROLES:
            built.required("target", role, thinking.end, (i % 200,))
    for kept in (built.required.cache_info(), built.vocabulary.cache_info()):
        assert kept.maxsize is not None
        assert kept.currsize <= kept.maxsize <= 512
    assert built.plain_map("target", "guider").folds == before


def test_the_same_texts_are_worked_out_once() -> None:
    built = vocabularies()
    assert built.required("target", "guider", END, (3, 4)) is built.required("target", "guider", END, (3, 4))
    assert built.vocabulary("target", ROLES, Thinking()) is built.vocabulary("target", ROLES, Thinking())


def test_forced_texts_are_encoded_in_each_roles_own_ids() -> None:
    vocabulary = vocabularies().vocabulary("target", ROLES, Thinking(end=END, wait="Wait", closing="So"))
    assert set(vocabulary.maps) == set(SMALL)
    assert vocabulary.forced_texts["guider"].end == (thinks().added_tokens[END],)
    assert vocabulary.forced_texts["target"].end == tuple(plain().encode(END))
    assert vocabulary.forced_texts["target"].wait == tuple(plain().encode("Wait"))
    assert vocabulary.forced_texts["guider"].closing == tuple(thinks().encode("So"))
    assert vocabulary.eos_ids == tuple(ENDS)
    assert vocabulary.added == frozenset(plain().added_tokens.values())


@pytest.mark.parametrize("text", ["</think>", "Wait", "Ada is Bob", "\n</think>", "so"])
def test_a_forced_text_continues_the_text_before(text: str) -> None:
    own = role_tokenizer(sentence_piece(), bos_token="<s>", eos_token="</s>")
    ids = (
        vocabularies(own, own).vocabulary("target", ROLES, Thinking("<think>", text, wait=text)).forced_texts["target"]
    )
    before = own.encode("The mentor")
    assert own.decode([*before, *ids.end]) == own.decode([*before, *ids.wait]) == "The mentor" + text


def test_the_tokens_that_complete_the_end_are_known_with_a_minimum() -> None:
    built = vocabularies()
    assert built.vocabulary("target", ROLES, Thinking("<think>", END)).closing_tokens is None
    assert built.vocabulary("target", ROLES, Thinking("", END, min_tokens=3)).closing_tokens is None
    closing = built.vocabulary("target", ROLES, Thinking("<think>", END, min_tokens=3)).closing_tokens
    assert closing is not None
    assert {plain().text_tokens[">"]} == closing.after(b"so </think")
    assert closing.after(b"so") == set()
    own = vocabularies(thinks(), thinks()).vocabulary("target", ROLES, Thinking("<think>", END, min_tokens=3))
    assert own.closing_tokens is not None
    assert own.closing_tokens.after(b"") == {thinks().added_tokens[END]}


def test_a_small_role_alone_needs_no_other_vocabulary() -> None:
    vocabulary = vocabularies().vocabulary("guider", ("guider",), Thinking())
    assert (vocabulary.maps, set(vocabulary.forced_texts)) == ({}, {"guider"})


def test_small_models_with_other_text_tokens_are_aligned() -> None:
    built = vocabularies(small=role_tokenizer(sentence_piece(), bos_token="<s>", eos_token="</s>"))
    assert built.aligned
    assert not vocabularies().aligned
    pair = built.alignment("guider")
    assert pair.special[ENDS[0]] == pair.special[ENDS[1]], "all ends are one event"
    assert built.required("target", "guider", END).ids.tolist() == []


def test_a_vocabulary_that_is_neither_bytes_nor_words_is_refused_by_name() -> None:
    words = Tokenizer(models.WordLevel({"Ada": 0, "Bob": 1}, unk_token="Ada"))
    with pytest.raises(UnsupportedTokenizer, match="WordLevel"):
        vocabularies(small=role_tokenizer(words, eos_token="Bob"))


def test_a_prompt_is_translated_token_by_token_after_the_roles_own_bos() -> None:
    target, small = plain(), role_tokenizer(byte_level(MARKS, bos="<s>"))
    ours, theirs = target.encode("The mentor of Ada"), small.encode("The mentor of Ada", special=True)
    assert len(theirs) == len(ours) + 1
    built = vocabularies(target, small)
    assert built.token_by_token("target", "guider", ours, theirs) == (theirs, list(range(2, len(theirs) + 1)))
    own = VocabularyRegistry({"target": small, "guider": target, "guider_base": target})
    assert own.token_by_token("target", "guider", theirs, ours) == (ours, list(range(len(ours) + 1)))


def test_an_added_token_that_a_role_lacks_is_translated_as_text() -> None:
    target, small = role_tokenizer(), plain()
    ours, theirs = target.encode("a<think>a"), small.encode("a<think>a")
    read = vocabularies(target, small).token_by_token("target", "guider", ours, theirs)
    assert read == (theirs, [1, len(theirs) - 1, len(theirs)])


def test_other_tokens_of_the_same_text_follow_the_targets_tokens() -> None:
    text = "The mentor"
    letters = [token for letter in text for token in plain().encode(letter)]
    read = vocabularies().token_by_token("target", "guider", letters, thinks().encode(text))
    assert read is not None
    assert len(read[0]) == len(letters) > len(thinks().encode(text))


def test_prompts_of_different_texts_have_no_translation() -> None:
    built, ours = vocabularies(), plain().encode("Ada")
    assert built.token_by_token("target", "guider", ours, thinks().encode("Bob")) is None
    assert built.token_by_token("target", "guider", [399], thinks().encode("Bob")) is None  # no token at all
