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
from numpy.typing import NDArray

from actors.api.generation import ROLES, Role
from actors.api.sampling_params import Sampling
from actors.decoding import compiling, kernels
from actors.decoding.candidates import PADDING, BlockLayout, CandidateBlock, Floats
from actors.decoding.compiling import UnsupportedProcessor, cache_misses, check_processor
from actors.decoding.penalties import Adjustments, adjustments
from actors.decoding.scoring import combined_logprobs
from actors.decoding.vocabulary import NO_REQUIRED_LOGITS, RequiredLogits, VocabularyMap, required_logits
from actors.warmup import compile_kernels
from actors.wire.ids import join_ids
from tests.decoding import formulas
from tests.decoding.compiled import RowSamplingSpec, decide_rows, stored
from tests.decoding.formulas import rank_ids
from tests.decoding.test_decision import Rows, block_of, decided, rows
from tests.support.deadlines import HANG_S

SAMPLINGS = [
    Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    for temperature, top_p, top_k, min_p in itertools.product(
        (0.0, 0.2, 0.6, 1.0, 1.4), (1.0, 0.95, 0.5), (0, 3), (0.0, 0.1)
    )
]
PENALTIES = Sampling(repetition_penalty=1.3, presence_penalty=0.4, logit_bias=((7, 2.0), (90, -3.0)))


def adjusted(sampling: Sampling, number: int) -> Adjustments | None:
    """Every third row has penalties and bans."""
    if number % 3:
        return None
    return adjustments(PENALTIES, range(20), {5: 2, 70: 1}, banned=(number, 11))


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
        found = decide_rows(block, numbers, specs, guided)
        expected = formulas.decide(block, numbers, specs, guided)
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
    block.logits[1, :, 3:60:4] = np.nan
    block.logits[2, :, 5:60:7] = np.nan
    found = decide_rows(block, range(6), specs, guided=True)
    expected = formulas.decide(block, range(6), specs, guided=True)
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
    script = "import actors.warmup as w; w.compile_kernels(); print(w.cache_misses())"
    root = Path(__file__).parents[2]
    moved = tmp_path / "code"
    moved.mkdir()
    (moved / "actors").symlink_to(root / "actors")
    compile_kernels()
    environment = os.environ | {"PYTHONPATH": str(moved)}
    told = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=moved, capture_output=True, text=True, timeout=HANG_S
    )
    assert told.stdout.split() == ["0"], told.stderr


def test_a_kernel_that_calls_changed_ones_is_compiled_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = compiling.SourceKeyedLocator(b"caller", 1).get_source_stamp()
    (tmp_path / "kernels.py").write_text("changed", encoding="utf-8")
    monkeypatch.setattr(compiling, "__file__", str(tmp_path / "compiling.py"))
    assert compiling.SourceKeyedLocator(b"caller", 1).get_source_stamp() != before


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


def folded(required: RequiredLogits, logits: NDArray[np.float32]) -> Floats:
    """Logits [B, g] of the required events of rows that arrive with logits [B, n] at the required ids."""
    rows = len(logits)
    block = stored(required, logits, np.zeros(rows), np.ones(rows))
    return np.stack([block.slice("target", row).folded for row in range(rows)])


def test_folding_adds_probabilities() -> None:
    mapping = VocabularyMap(np.arange(6), np.arange(6), {}, {5: (5, 2, 3), 1: (1,)})
    groups = required_logits(mapping.folds, mapping)
    logits = np.random.default_rng(0).normal(0, 30, (4, 6)).astype(np.float32)
    values = folded(groups, logits[:, groups.ids])
    assert groups.events.tolist() == [5, 1]
    np.testing.assert_array_equal(values[:, 1], logits[:, 1].astype(np.float64))
    top = logits.max(1).astype(np.float64)
    summed = np.log(np.exp(logits[:, [5, 2, 3]] - top[:, None]).astype(np.float64).sum(1)) + top
    np.testing.assert_allclose(values[:, 0], summed, rtol=1e-5)


def test_a_rows_fold_is_the_same_in_any_batch() -> None:
    groups = required_logits({8: (8, 3, 4, 5), 1: (1, 2)}, VocabularyMap(np.arange(9), np.arange(9)), [6])
    logits = np.random.default_rng(1).normal(0, 5, (50, len(groups.ids))).astype(np.float32)
    together = folded(groups, logits)
    assert all(folded(groups, logits[i : i + 1]).tobytes() == together[i : i + 1].tobytes() for i in range(50))
    expected = np.logaddexp.reduceat(logits.astype(np.float64), groups.starts, axis=1)
    assert together.tobytes() == expected.tobytes()


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
def test_the_mass_of_a_row_counts_a_folded_event_as_one_id(temperature: float) -> None:
    row = np.log(np.array([0.3, 0.3, 0.3, 0.1]))  # ids 0 and 2 are one event
    required = RequiredLogits(np.array([0, 2, 3], np.int32), np.array([0, 2]), np.array([0, 3]))
    sums = np.logaddexp.reduce(row / temperature)[None]
    together = np.log(np.array([0.6, 0.3, 0.1])) / temperature
    block = stored(required, row[None, [0, 2, 3]], sums, np.array([temperature]))
    np.testing.assert_allclose(block.tempered, np.logaddexp.reduce(together), atol=1e-6)


@pytest.mark.parametrize(("low", "counts"), [([7, 3, 9], [1, 1]), ([5, 6, 7], [3, 0]), ([1, 2, 0], [0, 2])])
def test_ids_arrive_as_the_wire_encodes_them(low: list[int], counts: list[int]) -> None:
    sent = sent_row(low, counts)
    block = CandidateBlock(1, BlockLayout({"target": NO_REQUIRED_LOGITS}, {"target": 3}))
    first = np.array([0])
    block.store_rows("target", first, sent, first, kernels.ALL, np.arange(150_000), np.ones(1))
    expected = join_ids(sent.low, sent.page_counts, [3], 150_000)
    assert block.slice("target", 0).ids.tolist() == expected.tolist()
    assert block.ceiling.tolist() == [0.0]


def test_ids_that_contradict_their_counts_are_refused() -> None:
    block = CandidateBlock(1, BlockLayout({"target": NO_REQUIRED_LOGITS}, {"target": 3}))
    first = np.array([0])
    for sent in (sent_row([1, 2, 3], [2, 2]), sent_row([1, 2, 20_000], [0, 0])):
        with pytest.raises(ValueError, match="contradict"):
            block.store_rows("target", first, sent, first, kernels.ALL, np.arange(150_000), np.ones(1))


def sent_row(low: list[int], counts: list[int]) -> kernels.SentRows:
    """One row of three ids of a vocabulary with three pages."""
    ids, pages, one = np.array(low, np.uint16), np.array(counts, np.uint16), np.zeros(1, np.float32)
    starts = np.array([[3, 0, 0, 0]])
    sent = kernels.SentRows(starts, ids, pages, 2, np.arange(3, dtype=np.float32), one, one, one[:0])
    for column in (sent.low, sent.page_counts, sent.logits, sent.logsumexp, sent.tempered, sent.required):
        column.flags.writeable = False
    return sent
