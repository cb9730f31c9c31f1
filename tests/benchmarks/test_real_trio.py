from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks.real_trio import perturbed_copy, real_trio
from benchmarks.shapes import service_config
from cluster.real.models import GEMMA3, SMOLLM2, RealModelError, real_folder
from tests.support.local_service import WEIGHTS


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models where the published ones would have been fetched to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real_folder().mkdir(parents=True)
    for model in (SMOLLM2, GEMMA3):
        (real_folder() / model.name).symlink_to(WEIGHTS / "guider_base")


def test_without_the_models_the_message_says_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RealModelError, match=r"python -m cluster\.real --fetch"):
        real_trio(tmp_path)


@pytest.mark.usefixtures("models")
def test_the_guider_is_the_base_with_the_trained_adapter_where_there_is_one(tmp_path: Path) -> None:
    trio = real_trio(tmp_path, WEIGHTS / "guider_dpo")
    config = service_config(trio.shape("other"), tmp_path, cache_tokens=64, sessions=1, speculate=True)
    assert trio.guider == "adapter guider_dpo"
    assert config.models.guider.path == config.models.guider_base.path == str(real_folder() / SMOLLM2.name)
    assert config.models.guider.adapter == str(WEIGHTS / "guider_dpo")
    assert (config.models.target.path, config.models.target.adapter) == (str(real_folder() / GEMMA3.name), None)


@pytest.mark.usefixtures("models")
def test_without_an_adapter_the_guider_is_a_perturbed_copy(tmp_path: Path) -> None:
    trio = real_trio(tmp_path, tmp_path / "no adapter")
    config = service_config(trio.shape("same"), tmp_path, cache_tokens=64, sessions=1, speculate=True)
    assert trio.guider == "perturbed copy"
    assert config.models.guider.path == str(tmp_path / "guider")
    assert config.models.target.path == config.models.guider_base.path
    assert {config.models.role(role).adapter for role in ("target", "guider", "guider_base")} == {None}


def test_a_perturbed_copy_changes_matrices_alone_and_is_the_same_each_time(tmp_path: Path) -> None:
    copies = [load_file(perturbed_copy(WEIGHTS / "guider", tmp_path / name) / "model.safetensors") for name in "ab"]
    before = load_file(WEIGHTS / "guider" / "model.safetensors")
    for name, tensor in before.items():
        assert np.array_equal(copies[0][name], copies[1][name])
        assert np.array_equal(copies[0][name], tensor) == (tensor.ndim == 1)
