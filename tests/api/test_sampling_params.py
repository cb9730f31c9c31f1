"""Validation of a request's sampling and thinking parameters."""

from __future__ import annotations

import math
from typing import Any

import pytest

from actors.api.sampling_params import Sampling, Thinking


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("temperature", [0, 0.6, 100], [-0.1, 100.1, math.nan, math.inf]),
        ("top_k", [0, 1, 10**9], [-1]),
        ("top_p", [1e-9, 1], [0, -0.1, 1.1, math.nan]),
        ("min_p", [0, 1], [-0.1, 1.1, math.nan]),
        ("repetition_penalty", [0.1, 100], [0, -1, math.nan]),
        ("presence_penalty", [-2, 2], [-2.1, 2.1, math.nan]),
        ("frequency_penalty", [-2, 2], [-2.1, 2.1, math.nan]),
        ("min_tokens", [0, 5], [-1]),
        ("max_tokens", [None, 1], [0, -1]),
        ("stop_on_repeat", [0, 2, 10], [-1, 1]),
        ("logit_bias", [((1, -100.0), (2, 100.0))], [((1, 100.1),), ((1, math.nan),)]),
        ("stop", [("a", "b")], [("a", "")]),
    ],
)
def test_each_parameter_has_its_range_and_says_its_name(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert getattr(Sampling(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(ValueError, match=name.split("_", maxsplit=1)[0]):
            Sampling(**{name: value})


def test_an_answer_cannot_be_both_longer_and_shorter() -> None:
    with pytest.raises(ValueError, match=r"min_tokens \(6\) is above max_tokens \(5\)"):
        Sampling(min_tokens=6, max_tokens=5)


@pytest.mark.parametrize(
    "fields",
    [
        {"start": "<think>", "end": ""},
        {"max_tokens": 0},
        {"min_tokens": -1},
        {"min_tokens": 5, "max_tokens": 4},
        {"min_tokens": 5, "wait": ""},
        {"closing": "enough</think>"},
        {"end": "abab", "closing": "ab"},  # with the end behind it, it ends the thinking two letters early
    ],
)
def test_contradictory_thinking_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="thinking"):
        Thinking(**fields)
