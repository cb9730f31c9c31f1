"""The compiled kernels, compared with the formulas as numpy writes them."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from actors.api.generation import ROLES, Role
from actors.api.sampling_params import Sampling
from actors.decoding.candidates import CandidateBlock
from actors.decoding.compiling import UnsupportedProcessor, cache_misses, check_processor
from actors.decoding.decision import RowSamplingSpec, decide
from actors.decoding.penalties import Adjustments, adjustments
from actors.decoding.scoring import combined_logprobs
from actors.decoding.warmup import compile_kernels
from tests.decoding import formulas
from tests.decoding.formulas import PADDING, rank_ids
from tests.decoding.test_decision import Rows, block_of, decided, rows

SAMPLINGS = [
    Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    for temperature, top_p, top_k, min_p in itertools.product(
        (0.0, 0.2, 0.6, 1.0, 1.4), (1.0, 0.95, 0.5), (0, 3), (0.0, 0.1)
    )
]
PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "logit_bias": ((7, 2.0), (90, -3.0))}


def adjusted(sampling: Sampling, number: int) -> Adjustments | None:
    """Every third row has penalties and bans."""
    if number % 3:
        return None
    return adjustments(Sampling(**PENALTIES), range(20), {5: 2, 70: 1}, banned=(number, 11))


def cases(spread: float, guided: bool) -> Iterator[tuple[CandidateBlock, list[RowSamplingSpec]]]:
    for number, sampling in enumerate(SAMPLINGS):
        many: Rows = []
        for whole, spec in rows(9, sampling, spread):
            extra = adjusted(sampling, number + spec.position)
            many.append((whole, RowSamplingSpec(spec.alpha, sampling, spec.seed + number, spec.position, extra)))
        roles: tuple[Role, ...] = ROLES if guided else ("target",)
        yield block_of(many, 40, roles), [spec for _, spec in many]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("spread", [1.0, 3.0, 6.0])
def test_decisions_are_those_of_the_formulas(spread: float, guided: bool) -> None:
    for block, specs in cases(spread, guided):
        numbers = range(len(specs))
        found = decide(block, numbers, specs, "target", guided)
        expected = formulas.decide(block, numbers, specs, "target", guided)
        assert found.tokens.tolist() == expected.tokens.tolist()
        assert found.target_tokens.tolist() == expected.target_tokens.tolist()
        assert found.settled.tolist() == expected.settled.tolist()
        assert found.no_legal_token.tolist() == expected.no_legal_token.tolist()
        np.testing.assert_allclose(found.outside, expected.outside, rtol=1e-9)
        np.testing.assert_allclose(found.uncovered, expected.uncovered, rtol=1e-9, atol=1e-14)
        np.testing.assert_allclose(found.filtered, expected.filtered, rtol=1e-14)
        for row, spec in enumerate(specs):
            count, rule = int(block.counts[row]), int(guided)
            logprobs = combined_logprobs(block.logits, block.sums, row, count, rule, spec.alpha)
            np.testing.assert_allclose(logprobs, expected.logprobs[row, :count], atol=1e-11)


def test_a_missing_counterpart_gets_the_neutral_delta() -> None:
    many = rows(6, Sampling(temperature=0.8, top_p=0.9))
    block, specs = block_of(many, 40), [spec for _, spec in many]
    block.values("guider")[:, 3:60:4] = np.nan
    block.values("guider_base")[:, 5:60:7] = np.nan
    found = decide(block, range(6), specs, "target", guided=True)
    expected = formulas.decide(block, range(6), specs, "target", guided=True)
    assert found.tokens.tolist() == expected.tokens.tolist()
    np.testing.assert_allclose(found.filtered, expected.filtered, rtol=1e-14)


def test_candidates_are_those_of_sorting_and_deduplicating() -> None:
    many = rows(30, Sampling())
    block = block_of(many, 25)
    for number, (whole, _) in enumerate(many):
        together = np.concatenate([np.argsort(-z, kind="stable")[:25] for z in whole[:2]])
        ids, inside, _ = rank_ids(together[None])
        count = int(block.counts[number])
        assert block.ids[number, :count].tolist() == ids[0, inside[0]].tolist()
        assert (block.ids[number, count:] == PADDING).all()


def test_compiled_kernels_are_reused_from_another_folder(tmp_path: Path) -> None:
    """The cache is keyed by source and versions: a second process, under another path, compiles nothing."""
    script = "from actors.decoding import warmup, compiling; warmup.compile_kernels(); print(compiling.cache_misses())"
    root = Path(__file__).parents[2]
    moved = tmp_path / "code"
    moved.mkdir()
    (moved / "actors").symlink_to(root / "actors")
    compile_kernels()
    environment = os.environ | {"PYTHONPATH": str(moved)}
    told = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=moved, capture_output=True, text=True, timeout=120
    )
    assert told.stdout.split() == ["0"], told.stderr


def test_decoding_compiles_nothing_after_the_warm_up() -> None:
    compile_kernels()
    before = cache_misses()
    for sampling in (Sampling(temperature=0), Sampling(temperature=0.7, top_p=0.9)):
        decided(rows(3, sampling), 40)
        decided(rows(3, sampling), None, guided=False)
    assert cache_misses() == before


def test_a_processor_below_the_level_is_refused_with_its_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    check_processor()
    monkeypatch.setattr("actors.decoding.compiling.binding.get_host_cpu_features", lambda: {"avx2": False, "fma": True})
    with pytest.raises(UnsupportedProcessor, match=r"lacks avx2, bmi2: .* x86-64-v3"):
        check_processor()
