"""The choice of a token depends on noise, filters and ties only."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from actors.api.sampling_params import Sampling
from actors.decoding.decision import choose
from actors.decoding.hashing import derive_seed, prefix_hash
from tests.decoding.compiled import Floats, Ints, filter_logits, gumbel, uniform

SPAN = 1 << 32
FILTERS = [
    Sampling(temperature=0.0),
    Sampling(temperature=1.0),
    Sampling(temperature=0.6, top_p=0.95),
    Sampling(temperature=1.3, top_k=7),
    Sampling(temperature=0.9, min_p=0.05),
    Sampling(temperature=0.8, top_k=20, top_p=0.7, min_p=0.01),
]


def rows(count: int, width: int, seed: int = 0) -> tuple[Ints, Floats]:
    """Ascending candidate ids and logits of `count` rows."""
    draw = np.random.default_rng(seed)
    ids = np.sort(np.stack([draw.choice(150_000, width, replace=False) for _ in range(count)]), axis=1)
    return ids, draw.normal(0, 3, (count, width))


def padded(ids: Ints, logits: Floats, width: int) -> tuple[Ints, Floats]:
    """The same rows in a wider array."""
    extra = ((0, 0), (0, width - ids.shape[1]))
    return np.pad(ids, extra, constant_values=SPAN), np.pad(logits, extra, constant_values=-np.inf)


def kept_logits(logits: Floats, parameters: list[Sampling]) -> Floats:
    """The filtered logits of rows that are whole, all of which are settled."""
    filtered, settled = filter_logits(logits, parameters)
    assert settled.all()
    return filtered


def plain_uniform(seed: int, position: int, token: int) -> float:
    """The definition in Python's integers: H(H(seed, position), id), 52 bits of it, in the middle of its interval."""
    bits = prefix_hash(prefix_hash(seed, position), token)
    return ((bits >> 12) + 0.5) / 2**52


def test_noise_is_the_same_in_python_integers_and_compiled() -> None:
    draw = np.random.default_rng(3)
    seeds = [0, 1, 2**64 - 1, *(derive_seed(i) for i in range(20))]
    positions = draw.integers(0, 2**20, len(seeds)).tolist()
    ids = draw.integers(0, 152_064, (len(seeds), 9))
    compiled_noise = uniform(np.array(seeds, np.uint64), np.array(positions, np.uint64), ids)
    for i, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        assert compiled_noise[i].tolist() == [plain_uniform(seed, position, int(token)) for token in ids[i]]


def test_uniforms_stay_strictly_inside_so_that_noise_is_finite() -> None:
    lowest, highest = 0.5 * 2.0**-52, (2**52 - 0.5) * 2.0**-52
    assert 0 < lowest
    assert highest < 1
    assert all(math.isfinite(-math.log(-math.log(u))) for u in (lowest, highest))


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel(np.arange(200, dtype=np.uint64), np.zeros(200, np.uint64), np.tile(np.arange(500), (200, 1)))
    assert abs(noise.mean() - 0.577216) < 0.015
    assert abs(noise.var() - math.pi**2 / 6) < 0.03


def test_choices_follow_the_softmax() -> None:
    logits = np.array([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -3.0])
    draws, temperature = 20_000, 0.8
    ids = np.tile(np.arange(8) * 1_000, (draws, 1))
    positions = np.arange(draws, dtype=np.uint64)
    sampling = [Sampling(temperature=temperature)] * draws
    tokens = choose(ids, np.tile(logits, (draws, 1)), sampling, np.full(draws, 7, np.uint64), positions)
    expected = np.exp(logits / temperature)
    expected *= draws / expected.sum()
    observed = np.bincount(tokens // 1_000, minlength=8)
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    assert chi_square < 24.3  # 99.9 % of chi-square with 7 degrees of freedom


def test_a_choice_does_not_depend_on_which_other_candidates_lose() -> None:
    ids, logits = rows(1, 60)
    sampling, seed, position = [Sampling(temperature=1.0)], np.array([5], np.uint64), np.array([9], np.uint64)
    chosen = choose(ids, logits, sampling, seed, position)[0]
    for drop in range(0, 60, 7):
        keep = np.delete(np.arange(60), drop)
        if ids[0, drop] != chosen:
            assert choose(ids[:, keep], logits[:, keep], sampling, seed, position)[0] == chosen


def test_ties_go_to_the_lowest_id() -> None:
    ids = np.array([[3, 8, 11, 40]])
    logits = np.array([[1.0, 5.0, 5.0, 5.0]])
    zero = np.zeros(1, np.uint64)
    assert choose(ids, logits, [Sampling(temperature=0)], zero, zero)[0] == 8
    kept = kept_logits(logits, [Sampling(temperature=1, top_k=2)])
    assert np.isfinite(kept).tolist() == [[False, True, True, False]]
    assert choose(ids, logits, [Sampling(temperature=1, top_k=1)], zero, zero)[0] == 8


@pytest.mark.parametrize("seed", range(4))
def test_padding_and_company_change_no_bit(seed: int) -> None:
    ids, logits = rows(len(FILTERS), 41, seed)
    seeds, positions = np.arange(len(FILTERS), dtype=np.uint64), np.full(len(FILTERS), 17, np.uint64)
    together = kept_logits(logits, FILTERS)
    tokens = choose(ids, logits, FILTERS, seeds, positions)
    for width in (41, 42, 48, 64, 128, 333):
        wide_ids, wide = padded(ids, logits, width)
        filtered = kept_logits(wide, FILTERS)
        assert filtered[:, :41].tobytes() == together.tobytes()
        assert np.isneginf(filtered[:, 41:]).all()
        assert choose(wide_ids, wide, FILTERS, seeds, positions).tolist() == tokens.tolist()
    for i in range(len(FILTERS)):
        one = slice(i, i + 1)
        assert kept_logits(logits[one], FILTERS[one]).tobytes() == together[one].tobytes()
        assert choose(ids[one], logits[one], FILTERS[one], seeds[one], positions[one])[0] == tokens[i]


def reference_filter(logits: list[float], sampling: Sampling) -> set[int]:
    """Places that stay by definition: temperature, min_p, top_k, then the nucleus of the rest."""
    scaled = [z / sampling.temperature for z in logits]
    top = max(scaled)
    ranked = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    kept = [i for i in ranked if math.exp(scaled[i] - top) >= sampling.min_p]
    if sampling.top_k:
        kept = kept[: sampling.top_k]
    total = math.fsum(math.exp(scaled[i] - top) for i in kept)
    nucleus: list[int] = []
    mass = 0.0
    for i in kept:
        if nucleus and mass >= sampling.top_p * total:
            break
        nucleus.append(i)
        mass += math.exp(scaled[i] - top)
    return set(nucleus)


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), list(itertools.product([0, 1, 5, 60], [1e-6, 0.3, 0.95, 1.0], [0.0, 0.02, 1.0]))
)
def test_filters_agree_with_a_plain_reference(top_k: int, top_p: float, min_p: float) -> None:
    _, logits = rows(6, 50, seed=top_k + 1)
    logits = np.round(logits, 1)  # ties
    sampling = Sampling(temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p)
    kept = np.isfinite(kept_logits(logits, [sampling] * 6))
    for row in range(6):
        assert set(np.flatnonzero(kept[row])) == reference_filter(logits[row].tolist(), sampling)


def test_what_survives_keeps_its_scaled_logit() -> None:
    _, logits = rows(1, 30)
    out = kept_logits(logits, [Sampling(temperature=0.5, top_p=0.8)])
    kept = np.isfinite(out)
    assert (out[kept] == (logits / 0.5)[kept]).all()


def test_banned_tokens_take_no_part_in_any_filter() -> None:
    logits = np.array([[9.0, -np.inf, 1.0, 0.5, -np.inf]])
    kept = np.isfinite(kept_logits(logits, [Sampling(temperature=1, top_k=2)]))
    assert kept.tolist() == [[True, False, True, False, False]]


def test_the_same_seed_at_another_position_draws_anew() -> None:
    ids, logits = np.tile(np.arange(64), (50, 1)), np.zeros((50, 64))
    sampling = [Sampling(temperature=1.0)] * 50
    tokens = choose(ids, logits, sampling, np.full(50, 3, np.uint64), np.arange(50, dtype=np.uint64))
    assert len(set(tokens.tolist())) > 20
