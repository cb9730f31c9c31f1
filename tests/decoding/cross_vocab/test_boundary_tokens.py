"""Tokens of a small model that cross the end of a text by a target with another vocabulary."""

from __future__ import annotations

import numpy as np
import pytest

from actors.decoding.cross_vocab.boundary_tokens import CrossingTokenFinder
from benchmarks.aligned import AlignedModel
from tests.support.trained_models import alignment, texts

PAIRS = (("pieces", "single"), ("single", "pieces"), ("grouped", "single"))


@pytest.mark.parametrize(("target", "role"), PAIRS)
def test_crossing_tokens_within_a_token_follow_the_targets_encoding(target: str, role: str) -> None:
    pair, found = alignment(target, role), 0
    said = pair.target.encode(texts()["english"].train[:600])[0]
    for at in range(len(said) - 1):
        for offset in range(1, len(pair.token_bytes(said[at]))):
            crossing_tokens = pair.crossing_finder.within((said[at],), offset)
            if crossing_tokens is None:
                continue
            begun = pair.token_bytes(said[at])[offset:]
            assert (np.diff(crossing_tokens.tokens) > 0).all()
            for token, follows in zip(crossing_tokens.tokens.tolist(), crossing_tokens.nexts.tolist(), strict=True):
                text = pair.role.texts[token] or b""
                assert text.startswith(begun)
                assert len(text) > len(begun)
                whole = (pair.token_bytes(said[at]) + text[len(begun) :]).decode()
                assert pair.target.encode(whole)[0][:2] == [said[at], follows]
                found += 1
    assert found > 20


def test_a_boundary_with_too_many_crossing_tokens_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = alignment("pieces", "single")
    places = [(t, n) for t, text in enumerate(pair.target.texts) if text for n in range(1, len(text))]
    here = next(place for place in places if _count(pair.crossing_finder.within((place[0],), place[1])) > 1)
    monkeypatch.setattr("actors.decoding.cross_vocab.boundary_tokens._MOST", 1)
    again = CrossingTokenFinder(pair.tables, pair.target, pair.token_bytes, pair.role)
    assert again.within((here[0],), here[1]) is None


def _count(crossing_tokens: object) -> int:
    return len(getattr(crossing_tokens, "tokens", ()))


def test_a_crossing_token_counts_for_tokens_that_its_next_token_represents() -> None:
    """The small model is certain of "$\\", the target has "\\" and "\\frac" and wrote "$": both are possible."""
    pair, tried = alignment("pieces", "single"), 0
    represented_by = pair.tables.represented_by
    longer = {
        int(x): t for t, x in enumerate(represented_by) if x != t
    }  # a target's token, by the one that its first part is
    assert longer
    for said in range(len(pair.target.texts)):
        crossing_tokens = pair.crossing_finder.between((said,))
        if crossing_tokens is None:
            continue
        pairs = zip(
            crossing_tokens.tokens.tolist(), crossing_tokens.nexts.tolist(), crossing_tokens.whole.tolist(), strict=True
        )
        for token, follows, whole in pairs:
            if follows not in longer:
                continue
            row = np.full(len(pair.role.texts), -20.0)
            row[token] = 20.0
            model = AlignedModel(pair, lambda _, row=row: row)  # type: ignore[misc]
            model.push(said)
            masses = np.exp(model.masses())
            assert masses[follows] > 0.9
            assert (masses[longer[follows]] > 0.9) == whole
            tried += 1
    assert tried > 5
