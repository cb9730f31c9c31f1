"""Bias, penalties and bans compared with a plain reference."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from actors.api.sampling_params import Sampling
from actors.decoding.penalties import adjustments, changes_rows, lifted_ids
from tests.decoding.compiled import adjust

IDS = np.array([2, 5, 9, 30, 31, 77])
LOGITS = np.array([1.5, -2.0, 0.0, 4.0, -0.5, 3.0])
PROMPT = frozenset({5, 30, 1_000})
OUTPUT = Counter({5: 3, 9: 1, 77: 2, 4_000: 5})


def reference(sampling: Sampling, banned: tuple[int, ...] = ()) -> list[float]:
    """One id at a time, in the order of vLLM."""
    out = []
    for token, logit in zip(IDS.tolist(), LOGITS.tolist(), strict=True):
        logit += dict(sampling.logit_bias).get(token, 0.0)
        if token in PROMPT or token in OUTPUT:
            penalty = sampling.repetition_penalty
            logit = logit / penalty if logit > 0 else logit * penalty
        if token in OUTPUT:
            logit -= sampling.presence_penalty + sampling.frequency_penalty * OUTPUT[token]
        out.append(-np.inf if token in banned else logit)
    return out


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(logit_bias=((5, 2.5), (31, -100.0), (6, 50.0))),
        Sampling(repetition_penalty=1.3),
        Sampling(repetition_penalty=0.7),
        Sampling(presence_penalty=1.5),
        Sampling(presence_penalty=-2.0, frequency_penalty=0.25),
        Sampling(frequency_penalty=-0.5, repetition_penalty=1.1, logit_bias=((9, 1.0), (77, -4.0))),
    ],
)
@pytest.mark.parametrize("banned", [(), (30,), (2, 77, 8)])
def test_adjusting_agrees_with_a_plain_reference(sampling: Sampling, banned: tuple[int, ...]) -> None:
    logits = LOGITS.copy()
    adjust(IDS, logits, sampling, adjustments(sampling, PROMPT, OUTPUT, banned))
    np.testing.assert_allclose(logits, reference(sampling, banned), rtol=1e-15)


def test_ids_that_are_no_candidates_are_passed_over() -> None:
    for ids in (IDS[:1], IDS[:0]):
        logits = LOGITS[: len(ids)].copy()
        sampling = Sampling(logit_bias=((6, 1.0), (9_999, 1.0)))
        adjust(ids, logits, sampling, adjustments(sampling, (), {}, banned=(3, 8_888)))
        assert logits.tolist() == LOGITS[: len(ids)].tolist()


def test_rows_are_adjusted_only_if_a_parameter_asks_for_it() -> None:
    assert not changes_rows(Sampling(temperature=0.3, top_k=4, min_tokens=9))
    for sampling in (
        Sampling(logit_bias=((1, 1.0),)),
        Sampling(repetition_penalty=1.1),
        Sampling(presence_penalty=0.1),
        Sampling(frequency_penalty=-0.1),
    ):
        assert changes_rows(sampling)


def test_ids_raised_by_the_request_are_required() -> None:
    assert lifted_ids(Sampling(logit_bias=((1, 5.0), (2, -5.0))), PROMPT, OUTPUT) == {1}
    assert lifted_ids(Sampling(presence_penalty=-1), PROMPT, OUTPUT) == set(OUTPUT)
    assert lifted_ids(Sampling(frequency_penalty=-1), PROMPT, OUTPUT) == set(OUTPUT)
    assert lifted_ids(Sampling(repetition_penalty=0.5), PROMPT, OUTPUT) == {*PROMPT, *OUTPUT}
    assert lifted_ids(Sampling(repetition_penalty=2, presence_penalty=2), PROMPT, OUTPUT) == set()


def test_only_ids_whose_bit_is_set_are_legal_where_a_row_has_bits() -> None:
    words = np.zeros(2, np.int32)
    for legal in (5, 31, 9):
        words[legal >> 5] |= np.array(1 << (legal & 31), np.uint32).view(np.int32)
    logits = LOGITS.copy()
    adjust(IDS, logits, Sampling(), replace(adjustments(Sampling(), (), {}), legal=words))
    assert IDS[np.isfinite(logits)].tolist() == [5, 9, 31]
