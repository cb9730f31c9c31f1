"""The schedule of alpha over the generated tokens."""

from __future__ import annotations

import math

import pytest

from actors.api.guidance import Guidance


def test_alpha_is_constant_by_default() -> None:
    assert [Guidance(0.7).alpha_at(n) for n in (0, 1, 10_000)] == [0.7] * 3


def test_the_warm_up_runs_the_target_alone_for_exactly_so_many_tokens() -> None:
    guidance = Guidance(1.0, warmup_tokens=3)
    assert [guidance.alpha_at(n) for n in range(5)] == [0, 0, 0, 1, 1]


def test_a_schedule_holds_from_its_positions_on() -> None:
    guidance = Guidance(1.0, schedule=((2, 0.5), (4, 0.0), (6, -1.0)))
    assert [guidance.alpha_at(n) for n in range(8)] == [1, 1, 0.5, 0.5, 0, 0, -1, -1]


def test_the_warm_up_stands_above_the_schedule() -> None:
    guidance = Guidance(1.0, warmup_tokens=3, schedule=((0, 2.0), (5, 0.5)))
    assert [guidance.alpha_at(n) for n in range(7)] == [0, 0, 0, 2, 2, 0.5, 0.5]


def test_guiding_the_thinking_ends_with_the_thinking() -> None:
    assert Guidance(1.0, guide="thinking").alpha_at(9, thinking_over=True) == 0
    assert Guidance(1.0, guide="thinking").alpha_at(9, thinking_over=False) == 1
    assert Guidance(1.0, guide="always").alpha_at(9, thinking_over=True) == 1


def test_guidance_that_is_zero_everywhere_needs_no_small_models() -> None:
    assert Guidance(0.0).never_guides()
    assert Guidance(0.0, schedule=((3, 0.0),)).never_guides()
    assert not Guidance(0.0, schedule=((3, 0.1),)).never_guides()
    assert not Guidance(1.0, warmup_tokens=100).never_guides()


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf])
def test_alpha_must_be_finite(alpha: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        Guidance(alpha)
    with pytest.raises(ValueError, match="finite"):
        Guidance(schedule=((1, alpha),))


def test_a_schedule_must_rise_from_zero() -> None:
    for schedule in (((3, 1.0), (2, 1.0)), ((2, 1.0), (2, 0.5)), ((-1, 1.0),)):
        with pytest.raises(ValueError, match="rise"):
            Guidance(schedule=schedule)


def test_other_values_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="warmup_tokens"):
        Guidance(warmup_tokens=-1)
    with pytest.raises(ValueError, match="sometimes"):
        Guidance(guide="sometimes")  # type: ignore[arg-type]
