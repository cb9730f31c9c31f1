"""Which tokens a grammar allows, in the vocabulary of the embedded target."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher, LLParserLimits
from llguidance.numpy import fill_next_token_bitmask

from actors.decoding import grammar as grammar_module
from actors.decoding.grammar import GrammarError, GrammarMatcher, GrammarVocabulary, fill_masks
from actors.text.tokenizer import RoleTokenizer
from actors.text.vocabularies import VocabularyRegistry
from tests.support.local_service import WEIGHTS

PERSON = LLMatcher.grammar_from_json_schema(
    {"type": "object", "properties": {"person": {"enum": ["Ada", "Bo"]}}, "required": ["person"]},
    overrides={"whitespace_flexible": False},
)


@pytest.fixture(scope="module")
def tokenizer() -> RoleTokenizer:
    return RoleTokenizer.load(str(WEIGHTS / "target"))


@pytest.fixture(scope="module")
def vocabulary(tokenizer: RoleTokenizer) -> GrammarVocabulary:
    return VocabularyRegistry({"target": tokenizer}).grammars("target")


def legal_ids(matcher: GrammarMatcher) -> list[int]:
    bits = np.unpackbits(matcher.legal().view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def walk(matcher: GrammarMatcher, tokens: Iterable[int]) -> None:
    for token in tokens:
        assert token in legal_ids(matcher)
        matcher.take(token)


def test_an_answer_that_obeys_is_legal_token_by_token_and_then_nothing_but_its_end(
    tokenizer: RoleTokenizer, vocabulary: GrammarVocabulary
) -> None:
    for text in ('{"person":"Ada"}', '{"person":"Bo"}'):
        matcher = vocabulary.matcher(PERSON)
        walk(matcher, tokenizer.encode_continuation(text))
        assert matcher.over
        assert legal_ids(matcher) == [tokenizer.eos_ids[0]]


def test_an_illegal_token_raises(tokenizer: RoleTokenizer, vocabulary: GrammarVocabulary) -> None:
    matcher = vocabulary.matcher(PERSON)
    stray = tokenizer.encode_continuation("x")[0]
    assert stray not in legal_ids(matcher)
    with pytest.raises(GrammarError):
        matcher.take(stray)


def test_a_vocabulary_without_an_end_has_grammars() -> None:
    """Models without an end token exist: their answers end where the grammar does."""
    tokens = [bytes([byte]) for byte in range(64)]
    vocabulary = GrammarVocabulary(tokens, [], [], range(64), list)
    matcher = vocabulary.matcher(LLMatcher.grammar_from_lark('start: "01" | "2"'))
    assert legal_ids(matcher) == [ord("0"), ord("2")]
    for token in b"01":
        assert not matcher.over
        matcher.take(token)
    assert matcher.over
    assert legal_ids(matcher) == []


def test_no_text_becomes_a_special_token(tokenizer: RoleTokenizer, vocabulary: GrammarVocabulary) -> None:
    matcher = vocabulary.matcher(LLMatcher.grammar_from_regex(r"(.|\n)*"))
    special = {*tokenizer.special_ids, *tokenizer.added_tokens.values()} - {tokenizer.eos_ids[0]}
    assert special
    assert special.isdisjoint(legal_ids(matcher))
    assert len(legal_ids(matcher)) > 1_000


def test_few_legal_ids_are_listed_and_many_are_not(tokenizer: RoleTokenizer, vocabulary: GrammarVocabulary) -> None:
    matcher = vocabulary.matcher(PERSON)
    assert matcher.few(1) == legal_ids(matcher) == tokenizer.encode_continuation("{")
    matcher.take(matcher.few(1)[0])
    several = legal_ids(matcher)
    assert matcher.few(len(several)) == several
    assert matcher.few(len(several) - 1) == []


def test_matchers_of_one_grammar_do_not_touch_each_other(
    tokenizer: RoleTokenizer, vocabulary: GrammarVocabulary
) -> None:
    one, other = vocabulary.matcher(PERSON), vocabulary.matcher(PERSON)
    walk(one, tokenizer.encode_continuation('{"person":"A'))
    assert legal_ids(other) == tokenizer.encode_continuation("{")


def test_a_grammar_that_cannot_be_compiled_raises_with_its_keyword(vocabulary: GrammarVocabulary) -> None:
    with pytest.raises(GrammarError, match="uniqueItems"):
        vocabulary.matcher(LLMatcher.grammar_from_json_schema({"type": "array", "uniqueItems": True}))


def test_a_grammar_that_takes_too_much_work_is_given_up(
    tokenizer: RoleTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_module, "LIMITS", LLParserLimits(step_max_items=5, verbose_errors=False))
    vocabulary = VocabularyRegistry({"target": tokenizer}).grammars("target")
    matcher = vocabulary.matcher(LLMatcher.grammar_from_lark('start: ("a" | "b" start "c" | start "d")+'))
    for _ in range(50):
        if not (legal := legal_ids(matcher)):
            break
        matcher.take(legal[-1])
    assert "given up" in matcher.error


def test_masks_behind_drafts_are_those_after_the_drafts(
    tokenizer: RoleTokenizer, vocabulary: GrammarVocabulary
) -> None:
    drafts = tokenizer.encode_continuation('{"person":"Ada"}')
    one, other = vocabulary.matcher(PERSON), vocabulary.matcher(PERSON)
    fill_masks([(one, drafts), (other, ())])
    assert (one.masks, other.masks) == (len(drafts) + 1, 1)
    for token in drafts:
        assert one.legal().tolist() == other.legal().tolist()
        one.take(token)
        other.take(token)
    assert one.masks == 1
    assert one.legal().tolist() == other.legal().tolist()


def test_another_token_than_the_draft_forgets_the_masks_behind_drafts(
    tokenizer: RoleTokenizer, vocabulary: GrammarVocabulary
) -> None:
    matcher = vocabulary.matcher(LLMatcher.grammar_from_regex("[ab]*"))
    a, b = (tokenizer.encode_continuation(each)[0] for each in "ab")
    fill_masks([(matcher, [a, a])])
    matcher.take(b)
    assert matcher.masks == 0
    assert a in legal_ids(matcher)


def test_drafts_of_a_grammar_are_legal_and_spell_what_must_come(
    tokenizer: RoleTokenizer, vocabulary: GrammarVocabulary
) -> None:
    matcher = vocabulary.matcher(PERSON)
    drafts = matcher.drafts(64)
    assert tokenizer.decode(drafts) == '{"person":"'
    assert matcher.legal_length(drafts) == len(drafts)
    assert matcher.drafts(2) == drafts[:2]
    assert matcher.drafts(0) == []
    walk(matcher, drafts)
    assert matcher.drafts(8) == []  # two names may follow


def test_legal_length_ends_before_the_first_illegal_token(
    tokenizer: RoleTokenizer, vocabulary: GrammarVocabulary
) -> None:
    matcher = vocabulary.matcher(PERSON)
    legal = tokenizer.encode_continuation('{"person')
    stray = tokenizer.encode_continuation("!")
    assert matcher.legal_length([*legal, *stray, *legal]) == len(legal)
    assert matcher.legal_length(stray) == 0
    walk(matcher, legal)  # nothing was taken


def test_an_ambiguous_grammar_is_given_up_before_its_masks_take_long(vocabulary: GrammarVocabulary) -> None:
    rules = "\n".join(f"a{number}: a{number + 1} a{number + 1} | a{number + 1} |" for number in range(40))
    matcher = vocabulary.matcher(LLMatcher.grammar_from_lark(f'start: a0\n{rules}\na40: "x" |'))
    with pytest.raises(GrammarError, match="given up"):
        take_likewise(matcher, 50)


def take_likewise(matcher: GrammarMatcher, count: int) -> None:
    for _ in range(count):
        matcher.take(next(id_ for id_ in reversed(legal_ids(matcher)) if id_ != matcher._vocabulary.end))


class Panic(BaseException):
    """As pyo3 raises a panic of Rust."""


class PanickingMatcher:
    def consume_token(self, token: int) -> None:
        raise Panic("index out of bounds")

    def compute_ff_tokens(self) -> list[int]:
        raise Panic("index out of bounds")

    def is_error(self) -> bool:
        return False


def panicking(vocabulary: GrammarVocabulary) -> GrammarMatcher:
    matcher = vocabulary.matcher(PERSON)
    broken: Any = PanickingMatcher()
    matcher._matcher = broken
    return matcher


def test_a_panic_of_rust_is_an_error_of_the_grammar(vocabulary: GrammarVocabulary) -> None:
    with pytest.raises(GrammarError, match="given up: index out of bounds"):
        panicking(vocabulary).take(1)
    matcher = panicking(vocabulary)
    assert matcher.drafts(8) == []
    assert "given up" in matcher.error


def test_a_panic_during_masks_ends_its_own_session_alone(
    vocabulary: GrammarVocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = vocabulary.matcher(PERSON), vocabulary.matcher(PERSON)

    def panic(executor: Any, matchers: list[Any], masks: Any) -> None:
        raise Panic("overflow")

    def fill_or_panic(matcher: Any, masks: Any) -> None:
        if matcher is bad._matcher:
            raise Panic("overflow")
        fill_next_token_bitmask(matcher, masks)

    monkeypatch.setattr(grammar_module, "fill_next_token_bitmask_par", panic)
    monkeypatch.setattr(grammar_module, "fill_next_token_bitmask", fill_or_panic)
    fill_masks([(bad, ()), (good, ())])
    assert "overflow" in bad.error
    assert legal_ids(bad) == []
    assert not good.error
    assert legal_ids(good)
