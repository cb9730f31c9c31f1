"""The integer hashes are the same on every machine and differ for different inputs."""

from __future__ import annotations

from actors.decoding.hashing import MASK, derive_seed, extend_hashes, mix64, prefix_hash


def test_mixing_is_the_finaliser_of_splitmix64() -> None:
    # The first outputs of the published splitmix64 generator with state 0.
    golden = 0x9E3779B97F4A7C15
    assert [mix64(golden * i) for i in (1, 2, 3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_mixing_is_a_bijection_on_what_was_tried() -> None:
    assert len({mix64(x) for x in range(20_000)}) == 20_000


def test_one_input_bit_moves_about_half_of_the_output_bits() -> None:
    flips = [(mix64(x) ^ mix64(x ^ (1 << bit))).bit_count() for x in range(50) for bit in range(64)]
    assert 30 < sum(flips) / len(flips) < 34


def test_one_step_of_a_prefix_hash_is_one_mixing() -> None:
    assert prefix_hash(11, 4) == mix64(11 + 5 * 0x9E3779B97F4A7C15)


def test_hashes_are_built_token_by_token() -> None:
    tokens = [5, 0, 0, 151_643]
    hashes = extend_hashes(7, tokens)
    running = 7
    for token, expected in zip(tokens, hashes, strict=True):
        running = prefix_hash(running, token)
        assert running == expected
    assert extend_hashes(hashes[1], tokens[2:]) == hashes[2:]
    assert extend_hashes(7, []) == []


def test_a_prefix_hash_depends_on_order_length_and_seed() -> None:
    variants = [(7, [1, 2]), (7, [2, 1]), (7, [1, 2, 0]), (7, [0, 1, 2]), (8, [1, 2]), (7, [1])]
    assert len({extend_hashes(seed, tokens)[-1] for seed, tokens in variants}) == len(variants)


def test_hashes_and_seeds_fit_64_bits() -> None:
    for seed in (0, 1, MASK, 1 << 70, -3):
        assert 0 <= derive_seed(seed, 1, 2) <= MASK
        assert 0 <= prefix_hash(seed & MASK, 0) <= MASK


def test_derived_seeds_follow_their_path() -> None:
    paths: list[tuple[int, ...]] = [(), (0,), (1,), (0, 0), (0, 1), (1, 0)]
    assert len({derive_seed(42, *path) for path in paths}) == len(paths)
    assert derive_seed(42, 3, 4) == derive_seed(42, 3, 4)
