"""Model roles are scaled by what their replicas say, within what Serve allows."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from actors.scaling import CACHE_TARGET, CACHE_USED, WAITING, WAITING_TARGET, replicas_wanted


@dataclass
class Context:
    current_num_replicas: int
    aggregated_metrics: dict[str, dict[str, float]] | None


def wanted(cache: list[float], waiting: list[float]) -> float:
    metrics = {CACHE_USED: dict(zip("abc", cache, strict=False)), WAITING: dict(zip("abc", waiting, strict=False))}
    return replicas_wanted(Context(len(cache), metrics))[0]


def test_replicas_at_their_targets_stay_as_many() -> None:
    assert wanted([CACHE_TARGET, CACHE_TARGET], [0, 0]) == pytest.approx(2)
    assert wanted([0.1, 0.1], [WAITING_TARGET, WAITING_TARGET]) == pytest.approx(2)


def test_a_full_cache_or_a_long_queue_asks_for_more() -> None:
    assert wanted([1.0, 0.9], [0, 0]) > 2
    assert wanted([0.0], [3 * WAITING_TARGET]) == pytest.approx(3)


def test_idle_replicas_want_to_go() -> None:
    assert wanted([0.0, 0.05, 0.0], [0, 1, 0]) < 1


def test_silence_changes_nothing() -> None:
    assert replicas_wanted(Context(2, None))[0] == 2
    assert replicas_wanted(Context(2, {CACHE_USED: {}, WAITING: {}}))[0] == 2
