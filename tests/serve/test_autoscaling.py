"""The autoscaling policy: replicas of a model role follow the metrics that they report, within Serve's limits."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ray import cloudpickle
from ray.serve.config import AutoscalingPolicy

from actors.config import ModelReplicas
from actors.serve.autoscaling import CACHE_USED, FEWER_AT, WAITING, LoadPolicy

TARGETS = ModelReplicas()
CACHE, WAIT = TARGETS.target_cache, TARGETS.target_waiting


@dataclass
class Context:
    target_num_replicas: int
    aggregated_metrics: dict[str, dict[str, float]] | None


def wanted(cache: list[float], waiting: list[float], now: int | None = None) -> int:
    metrics = {CACHE_USED: dict(zip("abc", cache, strict=False)), WAITING: dict(zip("abc", waiting, strict=False))}
    return LoadPolicy(CACHE, WAIT)(Context(now or len(cache), metrics))[0]


def test_replicas_at_their_targets_stay() -> None:
    assert wanted([CACHE, CACHE], [0, 0]) == 2
    assert wanted([0.1, 0.1, 0.1], [WAIT, WAIT, WAIT]) == 3


def test_full_cache_or_long_queue_adds_replicas() -> None:
    assert wanted([1.0], [0]) == 2
    assert wanted([1.0, 0.9], [0, 0]) == 3
    assert wanted([0.0], [3 * WAIT]) == 3


def test_replicas_that_still_start_stay_requested() -> None:
    assert wanted([1.0], [0], now=2) == 2


def test_idle_replicas_are_removed() -> None:
    assert wanted([0.0, 0.05, 0.0], [0, 1, 0]) == 1


def test_replica_is_removed_only_if_the_others_hold_its_sessions_easily() -> None:
    tight, loose = CACHE * (FEWER_AT + 0.05), CACHE * (FEWER_AT - 0.05)
    assert wanted([tight / 2, tight / 2], [0, 0]) == 2
    assert wanted([loose / 2, loose / 2], [0, 0]) == 1
    assert wanted([tight], [0]) == 1  # and this load adds none again


def test_missing_metrics_change_nothing() -> None:
    policy = LoadPolicy(CACHE, WAIT)
    assert policy(Context(2, None))[0] == 2
    assert policy(Context(2, {CACHE_USED: {}, WAITING: {}}))[0] == 2


def test_policy_runs_in_a_controller_without_this_projects_code(tmp_path: Path) -> None:
    pickled = tmp_path / "policy"
    pickled.write_bytes(
        AutoscalingPolicy(policy_function="actors.serve.autoscaling:LoadPolicy").get_serialized_policy_def()
    )
    assert cloudpickle.loads(pickled.read_bytes())(CACHE, WAIT)(Context(2, None))[0] == 2
    program = """
import pickle, sys
from types import SimpleNamespace as Context
policy = pickle.loads(open(sys.argv[1], "rb").read())
context = Context(target_num_replicas=1, aggregated_metrics={"cache_used": {"a": 1.0}})
assert policy(0.7, 32)(context)[0] == 2
assert not any(name.partition(".")[0] == "actors" for name in sys.modules)
"""
    subprocess.run([sys.executable, "-I", "-c", program, pickled], check=True, cwd=tmp_path)
