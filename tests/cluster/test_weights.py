"""Checkpoint sizes come from file headers, and damaged checkpoints are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from actors.engine.weight_files import INDEX, SINGLE, WeightsError
from cluster.weights import local_weights


def test_bytes_and_dtypes_are_read_from_the_headers(tmp_path: Path) -> None:
    save_file({"a": np.zeros((4, 8), np.float32), "b": np.zeros(6, np.float16)}, tmp_path / SINGLE)
    weights = local_weights(tmp_path)
    assert weights.stored_bytes == 4 * 8 * 4 + 6 * 2
    assert weights.parameters == {"F32": 32, "F16": 6}
    assert weights.dtype == "float32"


def test_loading_in_another_dtype_changes_floats_only(tmp_path: Path) -> None:
    save_file({"a": np.zeros(10, np.float32), "q": np.zeros(5, np.int8)}, tmp_path / SINGLE)
    weights = local_weights(tmp_path)
    assert weights.bytes_as("auto") == 45
    assert weights.bytes_as("bfloat16") == 25


def test_shards_add_up_and_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_file({"a": np.zeros(10, np.float32)}, tmp_path / "one.safetensors")
    save_file({"b": np.zeros(20, np.float32)}, tmp_path / "two.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert local_weights(tmp_path).stored_bytes == 120
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"lacks two\.safetensors"):
        local_weights(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": np.zeros(1_000, np.float32)}, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    for length in (4, 40, len(whole) - 1):
        (tmp_path / SINGLE).write_bytes(whole[:length])
        with pytest.raises(WeightsError, match="not a whole safetensors file"):
            local_weights(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [1], "data_offsets": [8, 4]},
        {"shape": [1], "data_offsets": [0, 1_000]},
        {"shape": [-1], "data_offsets": [0, 4]},
        {"shape": ["x"], "data_offsets": [0, 4]},
        "[" * 100_000,
    ],
    ids=["backwards", "beyond the file", "negative", "no number", "nested"],
)
def test_a_header_that_cannot_be_is_refused(tmp_path: Path, entry: Any) -> None:
    text = entry if isinstance(entry, str) else json.dumps({"a": {"dtype": "F32"} | entry})
    (tmp_path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(8))
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        local_weights(tmp_path)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="only safetensors files are supported"):
        local_weights(tmp_path)
