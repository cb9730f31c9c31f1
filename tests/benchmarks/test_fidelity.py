from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from actors.api.generation import ROLES, Role
from actors.config import ServiceConfig
from actors.preflight import load_tokenizers
from actors.replica.engine_thread import Engine
from benchmarks.fidelity import (
    Fidelity,
    bytes_per_token,
    counted,
    decode_case,
    distance,
    tail_case,
    trio_requests,
    worst,
)
from benchmarks.lockstep import Lockstep
from benchmarks.synthetic_models import guided_request, wide_config
from benchmarks.synthetic_rows import Tail, TailEngine, TailStream
from cluster.demo.task import questions
from tests.support.local_service import trio_config

WIDTH = 4_000


@pytest.fixture
def config(tmp_path: Path) -> ServiceConfig:
    return wide_config(tmp_path, WIDTH, exchange={"k": 128, "audit_every": 0})


def by_temperature(cases: list[Fidelity], widening: bool) -> dict[float, Fidelity]:
    return {case.temperature: case for case in cases if case.widening is widening}


def test_widening_restores_a_flat_tails_decisions_for_more_bytes(config: ServiceConfig) -> None:
    cases = list(tail_case(Tail(1.0), config, load_tokenizers(config), 12, lambda: None))
    narrow, final = by_temperature(cases, False), by_temperature(cases, True)
    assert narrow[1.0].tv_mean > 0.1
    assert final[1.0].tv_mean < 1e-6
    assert final[1.0].widened == 1
    assert final[1.0].bytes_per_token > 10 * narrow[1.0].bytes_per_token
    assert narrow[0.6].tv_mean < narrow[1.0].tv_mean


def test_a_steep_tail_needs_almost_no_widening(config: ServiceConfig) -> None:
    cases = list(tail_case(Tail(2.5), config, load_tokenizers(config), 12, lambda: None))
    for case in cases:
        assert case.rows == 12
        assert case.greedy_agreement == 1
        assert case.first_flip == 12
        assert case.tv_mean < 0.002
        assert case.widened < 0.5


def test_the_estimate_sees_a_base_that_is_far_below_outside_the_head(config: ServiceConfig) -> None:
    cases = list(tail_case(Tail(2.0, far=3.0), config, load_tokenizers(config), 12, lambda: None))
    narrow, final = by_temperature(cases, False), by_temperature(cases, True)
    assert narrow[1.0].tv_mean > 0.01
    assert final[1.0].tv_mean < 0.002


def test_decisions_from_whole_rows_match_plain_arithmetic(tmp_path: Path) -> None:
    config = wide_config(tmp_path, WIDTH, exchange={"mode": "full", "audit_every": 0})
    stream = TailStream(Tail(1.2), WIDTH)
    lockstep = Lockstep(config, load_tokenizers(config), {role: TailEngine(stream, role) for role in ROLES})
    (narrow, _) = decode_case("full", WIDTH, lockstep, [guided_request("a", [1], 6, 1.0)], lambda: None)
    assert narrow.greedy_agreement == 1
    assert narrow.tv_mean < 1e-12


def test_the_trio_is_measured_while_it_answers(trio_engines: Mapping[Role, Engine]) -> None:
    config = trio_config(exchange={"k": 16, "audit_every": 0})
    tokenizers = load_tokenizers(config)
    requests = trio_requests(tokenizers, questions("held_out", 2, 1), 0.6)
    narrow, final = decode_case("trio", 16, Lockstep(config, tokenizers, trio_engines), requests, lambda: None)
    assert narrow.rows == final.rows > 10
    assert final.tv_mean <= narrow.tv_mean < 0.05
    assert 500 < narrow.bytes_per_token <= final.bytes_per_token


async def test_slices_are_a_small_part_of_whole_rows(tmp_path: Path) -> None:
    sliced = await bytes_per_token(tmp_path, "topk", 1, 10, WIDTH)
    together = await bytes_per_token(tmp_path, "topk", 4, 10, WIDTH)
    whole = await bytes_per_token(tmp_path, "full", 1, 5, WIDTH)
    assert together < sliced < 8_000 < 3 * 4 * WIDTH < whole


def test_total_variation_counts_ids_outside_the_slice() -> None:
    whole = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    assert distance(np.array([0, 1]), whole[:2], whole, 1.0) == pytest.approx(0.2)
    assert distance(np.arange(4), whole, whole, 0.6) == pytest.approx(0.0, abs=1e-12)


def test_the_bar_takes_steep_tails_unwidened_and_everything_else_widened() -> None:
    def case(name: str, widening: bool, tv: float, k: int = 128) -> Fidelity:
        return Fidelity(name, k, 1.0, widening, 10, 1.0, 10, tv, tv, 0.0, 1.0)

    near, flat, far = str(Tail(2.2)), str(Tail(1.5)), str(Tail(2.5, far=3.0))
    cases = [case(name, on, 0.001 if name == near or on else 0.5) for name in (near, flat, far) for on in (False, True)]
    taken = counted([*cases, case("trio", False, 0.002), case("trio", False, 0.5, k=8)])
    assert [(each.case, each.widening) for each in taken] == [(near, False), (flat, True), (far, True), ("trio", False)]
    result = worst(taken, {"bytes_per_token": 5_900.4, "bytes_per_token_full": 1e6})
    assert result["tv_mean"] == 0.002
    assert result["bytes_per_token"] == 5_900
    keys = "k greedy_agreement tokens_to_first_flip tv_mean tv_p99 bytes_per_token bytes_per_token_full"
    assert list(result) == keys.split()
