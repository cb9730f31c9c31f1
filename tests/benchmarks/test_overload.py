"""The overload benchmark's figures from requests that were answered, refused or neither."""

from __future__ import annotations

import pytest

from benchmarks.crowd_client import Phase, RequestOutcome
from benchmarks.overload import BUSY, CALM, Measured
from benchmarks.sse_client import Stream


def answered(first: float, last: float, tokens: int = 10, user: str = "") -> RequestOutcome:
    return RequestOutcome(user, "admitted", Stream(0.0, first, last, tokens, 2))


def phase(*outcomes: RequestOutcome) -> Phase:
    return Phase(10.0, 20.0, outcomes)


def test_only_tokens_within_the_measured_interval_count() -> None:
    assert phase(answered(12, 14)).tokens_per_s == 1.0
    assert phase(answered(8, 12)).tokens_per_s == 0.5
    assert phase(answered(5, 25, 40)).tokens_per_s == 2.0
    assert phase(answered(2, 9), answered(21, 22), RequestOutcome("", "refused")).tokens_per_s == 0.0


def test_ratios_are_medians_of_rounds_and_counts_are_totals() -> None:
    measured = Measured()
    measured.phases["capacity"] = [phase(answered(12, 14, tokens)) for tokens in (100, 50, 200)]
    others = (RequestOutcome("", "hung"), RequestOutcome("", "failed"), RequestOutcome("", "refused"))
    measured.phases["overloaded"] = [
        phase(answered(12, 14, tokens), RequestOutcome("", "refused"), other)
        for tokens, other in zip((90, 50, 100), others, strict=True)
    ]
    measured.phases["obeying"] = measured.phases["capacity"]
    result = measured.result()
    counts = {name: result[name] for name in ("offered", "admitted", "refused", "hung", "failed")}
    assert counts == {"offered": 9, "admitted": 3, "refused": 4, "hung": 1, "failed": 1}
    assert (result["tokens_per_s_at_capacity"], result["tokens_per_s_overloaded"]) == (10.0, 9.0)
    assert result["ratio"] == 0.9  # of 0.9, 1 and 0.5
    assert result["obeying"]["ratio"] == 1.0


def test_fairness_is_reported_by_user() -> None:
    measured = Measured()
    for phases in measured.phases.values():
        phases.append(phase(answered(12, 14)))
    calm = [answered(12, 14, user=CALM), answered(12, 14, user=CALM)]
    busy = [answered(12, 14, user=BUSY)] * 6 + [RequestOutcome(BUSY, "refused")] * 14
    measured.phases["unequal"] = [phase(*calm, *busy)]
    fairness = measured.result()["fairness"]
    assert fairness[CALM] == {"offered": 2, "admitted": 2, "share_of_admitted": 0.25, "share_of_its_own": 1.0}
    assert fairness[BUSY]["share_of_its_own"] == pytest.approx(0.3)
