from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from actors.api.generation import Role
from actors.api.sampling_params import Sampling
from actors.preflight import load_tokenizers
from actors.replica.engine_thread import Engine
from benchmarks.lockstep import Lockstep
from benchmarks.real_rows import RealRows, decoded_rows, measure, perturbed_copy, requests, summary, table
from cluster.real.models import RealModelError
from tests.support.local_service import WEIGHTS, trio_config


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


def test_guided_rows_choose_as_whole_rows_do(trio_engines: Mapping[Role, Engine]) -> None:
    case = measured(trio_engines, Sampling(temperature=0.6, top_p=0.95), guided=True)
    assert case.agreement == 1.0
    assert case.tv_mean < 0.001
    assert table([case]).row_count == 1


def test_a_perturbed_copy_changes_matrices_alone_and_is_the_same_each_time(tmp_path: Path) -> None:
    copies = [load_file(perturbed_copy(WEIGHTS / "guider", tmp_path / name) / "model.safetensors") for name in "ab"]
    before = load_file(WEIGHTS / "guider" / "model.safetensors")
    for name, tensor in before.items():
        assert np.array_equal(copies[0][name], copies[1][name])
        assert np.array_equal(copies[0][name], tensor) == (tensor.ndim == 1)


def test_without_the_models_the_message_says_how_to_get_them() -> None:
    with pytest.raises(RealModelError, match=r"python -m cluster\.real --fetch"):
        measure(1)
