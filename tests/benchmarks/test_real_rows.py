from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice

import pytest

from actors.api.generation import Role
from actors.api.sampling_params import Sampling
from actors.preflight import load_tokenizers
from actors.replica.engine_thread import Engine
from benchmarks.lockstep import Lockstep
from benchmarks.real_rows import DRAFTS, TOKENS, RealRows, decoded_rows, drafts_kept, requests, summary, table, worst
from tests.support.local_service import trio_config


def measured(engines: Mapping[Role, Engine], sampling: Sampling, guided: bool) -> RealRows:
    """Forty rows of the embedded trio, from slices of eight."""
    config = trio_config(exchange={"k": 8, "audit_every": 0})
    tokenizers = load_tokenizers(config)
    rows = decoded_rows(Lockstep(config, tokenizers, engines), requests(tokenizers, sampling, guided))
    case = summary("same", guided, sampling, islice(rows, 40))
    rows.close()
    assert [engine.cache_stats().sessions for engine in engines.values()] == [0, 0, 0]
    return case


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_rows_of_one_model_are_widened_only_if_their_nucleus_exceeds_the_slice(
    trio_engines: Mapping[Role, Engine], temperature: float
) -> None:
    case = measured(trio_engines, Sampling(temperature=temperature, top_p=0.95), guided=False)
    assert (case.rows, case.agreement) == (40, 1.0)
    assert case.tv_worst < 1e-6
    assert case.exceeding <= case.widened <= case.exceeding + 0.05
    assert case.whole <= case.widened


def test_greedy_rows_of_one_model_are_never_widened(trio_engines: Mapping[Role, Engine]) -> None:
    case = measured(trio_engines, Sampling(temperature=0.0), guided=False)
    assert (case.widened, case.exceeding, case.agreement) == (0.0, 0.0, 1.0)
    assert case.bytes_per_token == case.narrow_bytes_per_token
    assert case.uncovered_at_last == case.uncovered > 0


def test_guided_rows_choose_as_whole_rows_do(trio_engines: Mapping[Role, Engine]) -> None:
    case = measured(trio_engines, Sampling(temperature=0.6, top_p=0.95), guided=True)
    assert case.agreement == 1.0
    assert case.tv_mean < 0.001
    assert table("sft", [case]).row_count == 1


def test_widening_covers_more_mass_for_more_bytes(trio_engines: Mapping[Role, Engine]) -> None:
    case = measured(trio_engines, Sampling(temperature=1.0), guided=True)
    assert case.widened > 0.2
    assert case.uncovered_at_last < case.uncovered < 1
    assert 0 < case.unseen < 1
    assert case.bytes_per_token > case.narrow_bytes_per_token > 500


async def test_drafts_of_the_guider_are_counted_by_a_service(trio_engines: Mapping[Role, Engine]) -> None:
    config = trio_config(speculation={"adapt": False})
    tokenizers = load_tokenizers(config)
    for guided in (True, False):
        asked = list(islice(requests(tokenizers, Sampling(temperature=0.0), guided, DRAFTS), 3))
        drafted, accepted = await drafts_kept(config, trio_engines, asked)
        assert 0 < accepted < drafted
        assert accepted < len(asked) * TOKENS


def test_the_result_has_the_worst_case_of_each_family(trio_engines: Mapping[Role, Engine]) -> None:
    case = replace(measured(trio_engines, Sampling(temperature=0.0), guided=False), tv_mean=0.0, tv_worst=0.0)
    warm = replace(case, temperature=0.6, agreement=0.5, tv_mean=0.001, tv_worst=0.01)
    other = [
        replace(each, family="other") for each in (case, replace(warm, tv_mean=0.004), replace(case, agreement=0.9))
    ]
    assert worst("adapter sft", [case, warm, replace(warm, temperature=1.0, tv_mean=0.002), *other]) == {
        "guider": "adapter sft",
        "same": {"greedy_agreement": 1.0, "tv_mean": 0.002, "tv_worst": 0.01},
        "other": {"greedy_agreement": 0.9, "tv_mean": 0.004, "tv_worst": 0.01},
    }
