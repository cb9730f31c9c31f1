from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.real_trio import FAMILIES, real_trio
from benchmarks.shapes import service_config
from cluster.real.models import ADAPTER, GEMMA3, SMOLLM2, RealModelError, real_folder


def test_without_the_models_the_message_says_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RealModelError, match=r"python -m cluster\.real --fetch"):
        real_trio()


@pytest.mark.usefixtures("stand_ins")
def test_the_guider_is_its_base_with_the_trained_adapter(tmp_path: Path) -> None:
    for family, target in zip(FAMILIES, (SMOLLM2, GEMMA3), strict=True):
        config = service_config(real_trio().shape(family), tmp_path, cache_tokens=64, sessions=1, speculate=True)
        models = config.models
        assert models.guider.path == models.guider_base.path == str(real_folder() / SMOLLM2.name)
        assert (models.guider.adapter, models.guider_base.adapter) == (str(ADAPTER), None)
        assert (models.target.path, models.target.adapter) == (str(real_folder() / target.name), None)
