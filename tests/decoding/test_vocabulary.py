"""Maps between vocabularies that have only their text tokens in common."""

from __future__ import annotations

import numpy as np
import pytest

from actors.decoding.vocabulary import (
    Vocabulary,
    VocabularyError,
    VocabularyMap,
    map_vocabulary,
    marker_fold,
    required_logits,
    self_map,
)
from tests.support.letter_vocabularies import adapter, text, vocabulary

END = "</think>"


def mapped(primary: Vocabulary, role: Vocabulary) -> VocabularyMap:
    return map_vocabulary(primary, role, adapter(role))


def folded_marker(primary: Vocabulary, role: Vocabulary) -> dict[int, tuple[int, ...]]:
    return marker_fold(primary, role, mapped(primary, role), END, adapter(primary))


def test_text_tokens_match_by_spelling_wherever_they_stand() -> None:
    primary, role = vocabulary({"<e>": 40}, ["<e>"]), vocabulary({"<e>": 0}, ["<e>"], first=3)
    mapping = mapped(primary, role)
    for ours in text().values():
        assert mapping.to_role[ours] == ours + 3
        assert mapping.to_primary[ours + 3] == ours
        assert mapping.tokens(ours) == (ours + 3,)


def test_added_tokens_match_by_content_and_never_by_id() -> None:
    primary = vocabulary({"<e>": 40, "<think>": 41, "<box>": 42}, ["<e>"])
    role = vocabulary({"<e>": 42, "<think>": 40, "<user>": 41}, ["<e>"])
    mapping = mapped(primary, role)
    assert mapping.to_role[[40, 41, 42]].tolist() == [42, 40, -1]
    assert mapping.to_primary[[40, 41, 42]].tolist() == [41, -1, 40]


def test_an_added_token_that_the_role_lacks_is_spelled() -> None:
    primary, role = vocabulary({"<e>": 40, END: 41}, ["<e>"]), vocabulary({"<e>": 40}, ["<e>"])
    assert mapped(primary, role).tokens(41) == tuple(text()[letter] for letter in END)


def test_an_added_token_without_a_row_in_the_role_is_read_as_text() -> None:
    primary = vocabulary({"<e>": 40, END: 41}, ["<e>"])
    role = vocabulary({"<e>": 40, END: 99}, ["<e>"], width=64)

    def encode(written: str) -> list[int]:
        return [99] if written == END else adapter(vocabulary({"<e>": 40}, ["<e>"]))(written)

    assert map_vocabulary(primary, role, encode).tokens(41) == tuple(text()[letter] for letter in END)


def test_padding_of_either_width_has_no_counterpart() -> None:
    primary, role = vocabulary({"<e>": 40}, ["<e>"], width=64), vocabulary({"<e>": 30}, ["<e>"], width=48)
    mapping = mapped(primary, role)
    assert mapping.to_role.shape == (64,)
    assert mapping.to_primary.shape == (48,)
    assert (mapping.to_role[41:] == -1).all()
    assert (mapping.to_primary[31:] == -1).all()
    assert set(np.flatnonzero(~primary.legal())) == {*range(len(text()), 40), *range(41, 64)}


def test_ids_beyond_the_width_of_a_row_are_left_out() -> None:
    primary, role = vocabulary({"<e>": 30, "<x>": 90}, ["<e>"], width=32), vocabulary({"<e>": 30, "<x>": 31}, ["<e>"])
    mapping = mapped(primary, role)
    assert mapping.to_primary[31] == -1
    assert 90 not in mapping.expansions


def test_the_end_is_one_event_however_many_ids_it_has() -> None:
    primary = vocabulary({"<e1>": 40, "<e2>": 41}, ["<e1>", "<e2>"])
    role = vocabulary({"<e2>": 30, "<e3>": 31, "<e1>": 32}, ["<e2>", "<e3>", "<e1>"])
    mapping = mapped(primary, role)
    assert mapping.folds == {40: (30, 31, 32)}
    assert mapping.to_role[[40, 41]].tolist() == [30, -1]
    assert mapping.to_primary[[30, 31, 32]].tolist() == [40, -1, -1]
    assert mapping.tokens(40) == mapping.tokens(41) == (30,)
    assert self_map(primary).folds == {40: (40, 41)}
    assert self_map(primary).to_role[41] == -1


def test_only_the_first_end_may_be_chosen() -> None:
    assert vocabulary({"<e1>": 40, "<e2>": 41}, ["<e2>", "<e1>"]).legal()[[40, 41]].tolist() == [False, True]


def test_an_ordinary_token_is_not_mapped_to_another_models_end() -> None:
    primary = vocabulary({"<e>": 40, "<pad>": 41}, ["<e>"])
    role = vocabulary({"<e>": 40, "<pad>": 41}, ["<pad>"])
    mapping = mapped(primary, role)
    assert mapping.to_role[40] == 41  # the end is the end
    assert mapping.to_role[41] == -1
    assert mapping.to_primary[40] == -1
    assert mapping.tokens(41) == (41,)  # but its text is that token


def test_text_tokens_that_differ_are_refused_with_their_ids() -> None:
    primary, role = vocabulary({"<e>": 40}, ["<e>"]), vocabulary({"<e>": 40}, ["<e>"])
    ours = Vocabulary({**primary.text, "Ω": 33}, primary.added, primary.eos_ids, primary.width)
    theirs = Vocabulary({**role.text, "ж": 37, "щ": 36}, role.added, role.eos_ids, role.width)
    with pytest.raises(VocabularyError, match=r"1 are only in the first model \(ids 33\), 2 only in .* \(ids 36, 37\)"):
        mapped(ours, theirs)
    with pytest.raises(VocabularyError, match=r"\(ids none\), 2 only"):
        mapped(primary, theirs)


def test_a_roles_marker_token_counts_for_the_first_token_of_its_text() -> None:
    primary, role = vocabulary({"<e>": 40}, ["<e>"]), vocabulary({"<e>": 40, END: 41}, ["<e>"])
    first = text()["<"]
    assert folded_marker(primary, role) == {first: (first, 41)}
    assert mapped(primary, role).folds == {40: (40,)}


def test_a_marker_is_folded_in_the_roles_own_ids() -> None:
    primary, role = vocabulary({"<e>": 40}, ["<e>"]), vocabulary({"<e>": 60, END: 61}, ["<e>"], first=20)
    first = text()["<"]
    assert folded_marker(primary, role) == {first: (first + 20, 61)}


def test_a_marker_that_both_have_or_neither_has_is_not_folded() -> None:
    plain, marked = vocabulary({"<e>": 40}, ["<e>"]), vocabulary({"<e>": 40, END: 44}, ["<e>"])
    assert folded_marker(marked, marked) == {}
    assert folded_marker(plain, plain) == {}
    assert folded_marker(marked, plain) == {}


def test_a_marker_beyond_the_width_of_a_row_is_not_folded() -> None:
    primary, role = vocabulary({"<e>": 40}, ["<e>"]), vocabulary({"<e>": 40, END: 90}, ["<e>"], width=41)
    assert folded_marker(primary, role) == {}


def test_a_marker_that_ends_the_roles_text_is_its_end_and_nothing_else() -> None:
    primary, role = vocabulary({"<e>": 40}, ["<e>"]), vocabulary({"<e>": 40, END: 41}, ["<e>", END])
    assert mapped(primary, role).folds == {40: (40, 41)}
    assert folded_marker(primary, role) == {}


def test_a_marker_that_the_primary_cannot_spell_is_not_folded() -> None:
    primary, role = vocabulary({"<e>": 40}, ["<e>"]), vocabulary({"<e>": 40, END: 41}, ["<e>"])
    assert marker_fold(primary, role, mapped(primary, role), END, lambda _: []) == {}


def test_a_marker_whose_first_token_the_role_lacks_is_not_folded() -> None:
    primary = vocabulary({"<e>": 40, "</th": 41}, ["<e>"])
    role = vocabulary({"<e>": 40, END: 41}, ["<e>"])
    assert folded_marker(primary, role) == {}


def test_forced_ids_are_required_once_and_only_if_the_role_has_them() -> None:
    mapping = VocabularyMap(np.array([0, -1, 4, 3, 2]), np.arange(5), {}, {3: (3, 1)})
    groups = required_logits(mapping.folds, mapping, [4, 2, 1, 3, 2])
    assert groups.events.tolist() == [3, 2, 4]
    assert groups.ids.tolist() == [3, 1, 4, 2]
    assert groups.starts.tolist() == [0, 2, 3]


def test_without_end_tokens_there_is_nothing_to_fold() -> None:
    plain = vocabulary({"<x>": 40})
    assert self_map(plain).folds == {}
    assert mapped(plain, plain).folds == {}
    assert required_logits({}, self_map(plain)).ids.tolist() == []
