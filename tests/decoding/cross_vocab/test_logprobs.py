"""Log-probabilities of the target's tokens under small models with another vocabulary."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest

from actors.decoding.candidates import PADDING, Floats, RowSlice
from actors.decoding.cross_vocab.logprobs import FLOOR, CrossingRows, RoleRowInput, TokenEventLogprobs
from actors.decoding.cross_vocab.translators import Alignment, RetokenizingTranslator
from actors.decoding.stream import Stream
from benchmarks.aligned import AlignedModel, difference
from benchmarks.trigrams import Trigrams
from tests.support.trained_models import alignment, hashed, texts, tokenizer

Model = Callable[[Sequence[int]], Floats]
PAIRS = [("grouped", "single"), ("single", "grouped"), ("pieces", "single"), ("bytes", "large"), ("single", "pieces")]


def decode(target: Model, pair: Alignment, guider: Model, base: Model, steps: int = 60) -> list[int]:
    """Greedy tokens of the guided target, text tokens only."""
    small = [AlignedModel(pair, model) for model in (guider, base)]
    legal = np.array([bool(text) for text in pair.target.texts])
    said: list[int] = []
    for _ in range(steps):
        logits = target(said)[: len(legal)] + difference(*(model.masses() for model in small))[: len(legal)]
        said.append(int(np.where(legal, logits, -np.inf).argmax()))
        for model in small:
            model.push(said[-1])
    return said


@pytest.mark.parametrize("kind", ["grouped", "pieces"])
def test_with_one_tokenizer_an_event_is_its_token(kind: str) -> None:
    pair, model = alignment(kind, kind), hashed(tokenizer(kind), 2)
    aligned = AlignedModel(pair, model)
    for token in pair.target.encode(texts()["reasoning"].train[:300])[0]:
        logits = model(aligned.stream.tokens)
        log_p = np.maximum(logits - np.logaddexp.reduce(logits), FLOOR)
        masses = aligned.masses()
        alone = [t for t, text in enumerate(pair.role.texts) if text and len(pair.tables.events[t]) == 1]
        assert np.allclose(masses[alone], log_p[alone], atol=1e-9)
        aligned.push(token)


@pytest.mark.parametrize(("target", "role"), PAIRS)
def test_a_guider_that_is_its_base_changes_nothing(target: str, role: str) -> None:
    own, small = hashed(tokenizer(target), 1), hashed(tokenizer(role), 2)
    legal = np.array([bool(text) for text in tokenizer(target).adapter.texts])
    alone: list[int] = []
    for _ in range(60):
        alone.append(int(np.where(legal, own(alone)[: len(legal)], -np.inf).argmax()))
    assert decode(own, alignment(target, role), small, small) == alone


@pytest.mark.parametrize(("target", "role"), PAIRS)
def test_a_constant_on_the_guiders_logits_changes_nothing(target: str, role: str) -> None:
    own, guider, base = hashed(tokenizer(target), 1), hashed(tokenizer(role), 2), hashed(tokenizer(role), 3)
    pair = alignment(target, role)
    plain = decode(own, pair, guider, base)
    assert decode(own, pair, lambda tokens: guider(tokens) + 7.5, base) == plain


@pytest.mark.parametrize(("target", "role"), PAIRS)
def test_the_events_of_a_row_share_one_probability(target: str, role: str) -> None:
    pair = alignment(target, role)
    model = AlignedModel(pair, hashed(tokenizer(role), 2))
    totals = []
    for token in pair.target.encode(texts()["english"].train[:400])[0]:
        masses = model.masses()
        # Tokens that are no image use the mass of one that is. They do not count twice.
        images = np.unique(pair.tables.image[pair.tables.image >= 0])
        totals.append(float(np.exp(masses[images]).sum()))
        model.push(token)
    assert max(totals) <= 1 + 1e-6
    assert np.median(totals) > 0.9


def _first_bytes(model: Model, pair: Alignment, tokens: Sequence[int], pending: bytes, depth: int) -> Floats:
    """[256] by enumeration of paths: log P(the text behind `tokens` begins with `pending`, and then with each byte)."""
    out = np.full(256, -np.inf)
    open_paths = [(tuple(tokens), pending, 0.0)]
    for _ in range(depth):
        following = []
        for path, rest, weight in open_paths:
            logits = model(tuple(path))
            log_p = logits - np.logaddexp.reduce(logits) + weight
            for v, text in enumerate(pair.role.texts):
                if not text:
                    continue
                if len(text) > len(rest) and text.startswith(rest):
                    out[text[len(rest)]] = np.logaddexp(out[text[len(rest)]], log_p[v])
                elif rest.startswith(text):
                    following.append(((*path, v), rest[len(text) :], float(log_p[v])))
        open_paths = following
    return out


def test_a_target_of_bytes_approaches_the_sum_over_all_tokenizations() -> None:
    pair, corpus = alignment("bytes", "single"), texts()["reasoning"].train
    spellable = [id_ for id_, data in enumerate(pair.role.texts) if data]
    trigrams = Trigrams(pair.role.encode(corpus[2_000:])[0], tokenizer("single").width, spellable)
    model, text = cache(lambda tokens: trigrams(tokens[-2:])), corpus[:150].encode()
    by_byte = {data[0]: id_ for id_, data in enumerate(pair.target.texts) if data}
    aligned, distances = AlignedModel(pair, lambda tokens: model(tuple(tokens))), list[float]()
    before: list[tuple[tuple[int, ...], int]] = []  # the true tokens of each text so far, and its bytes
    for at, byte in enumerate(text):
        before.append((tuple(aligned.stream.tokens), at))
        masses = np.exp(aligned.masses())
        # All token sequences that begin at the true tokens of up to five bytes ago.
        start, begun = next((tokens, n) for tokens, n in before[-6:] if _settled(pair, tokens, text[:at], n))
        exact = _first_bytes(model, pair, start, text[begun:at], depth=6)
        exact = np.exp(exact - np.logaddexp.reduce(exact))
        ours = np.array([masses[by_byte[each]] for each in range(256)])
        ours = np.nan_to_num(ours) / np.nansum(ours)
        distances.append(0.5 * float(np.abs(ours - exact).sum()))
        aligned.push(by_byte[byte])
    assert np.mean(distances) < 0.06, np.mean(distances)


def _settled(pair: Alignment, tokens: Sequence[int], text: bytes, begun: int) -> bool:
    """True if a text's true tokens begin with those of its first `begun` bytes."""
    return pair.role.encode(text.decode())[0][: len(tokens)] == list(tokens)


def test_rows_of_one_block_do_not_change_each_other() -> None:
    pair, draw = alignment("pieces", "single"), np.random.default_rng(4)
    width, tables = tokenizer("single").width, pair.tables
    reader = RetokenizingTranslator(pair, Stream(1, [3]))
    inputs, candidates = [], []
    for token in pair.target.encode(texts()["english"].train[:150])[0]:
        boundaries = reader.translate_drafts(()).boundaries_by_row[0]
        crossing = CrossingRows(boundaries) if boundaries is not None else None
        if crossing is not None:
            crossing.values[:], crossing.sums[:] = draw.normal(size=len(crossing.ids)), 8.0
        inputs.append(RoleRowInput(RowSlice(np.arange(width), draw.normal(size=width), np.zeros(0), 8.0), crossing))
        candidates.append(np.sort(draw.choice(tokenizer("pieces").width, 40, replace=False)))
        reader.append(token)
    ids, inside = np.stack(candidates), np.ones((len(inputs), 40), np.bool_)
    inside[::3, 30:] = False  # some rows have fewer
    ids[::3, 30:] = PADDING
    together = TokenEventLogprobs(tables, ids, inside, inputs).masses()
    assert any(each.crossing is not None for each in inputs)
    for row, each in enumerate(inputs):
        alone = TokenEventLogprobs(tables, ids[row : row + 1], inside[row : row + 1], [each]).masses()
        assert np.array_equal(together[row], alone[0], equal_nan=True)


def test_a_slice_and_lookups_give_the_values_of_the_full_row() -> None:
    pair, row = alignment("grouped", "single"), np.random.default_rng(9).normal(size=tokenizer("single").width)
    total, ids = float(np.logaddexp.reduce(row)), np.arange(200, 260)[None]
    inside: np.ndarray[tuple[int, ...], np.dtype[np.bool_]] = np.ones(ids.shape, np.bool_)
    whole = TokenEventLogprobs(
        pair.tables, ids, inside, [RoleRowInput(RowSlice(np.arange(len(row)), row, np.zeros(0), total), None)]
    )
    top = np.unique(whole.tokens)[::2]
    sliced = TokenEventLogprobs(
        pair.tables, ids, inside, [RoleRowInput(RowSlice(top, row[top], np.zeros(0), total), None)]
    )
    _, places, asked = sliced.missing_logits()
    assert 0 < len(asked) < len(sliced.tokens)
    sliced.fill(places, row[asked])
    assert np.array_equal(sliced.masses(), whole.masses(), equal_nan=True)


def test_crossing_tokens_propose_their_next_tokens() -> None:
    pair = alignment("pieces", "single")
    tables = pair.tables
    crossing = 0
    for node in itertools.islice(range(1, len(tables.crossing_tokens.starts) - 1), 200):
        for token, follows in zip(tables.crossing_tokens[node].tolist(), tables.nexts[node].tolist(), strict=True):
            spelling = pair.target.encode((pair.role.texts[token] or b"").decode(errors="replace"))[0]
            at = [n for n in range(1, len(spelling)) if tables.walk(spelling[:n]) == node]
            crossing += bool(at) and spelling[at[0]] == follows
    assert crossing > 200
