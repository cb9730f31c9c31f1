"""Fixtures of several tests of benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models where the published ones would have been fetched to."""
    from cluster.real.models import GEMMA3, SMOLLM2, real_folder
    from tests.support.local_service import WEIGHTS

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real_folder().mkdir(parents=True)
    for model in (SMOLLM2, GEMMA3):
        (real_folder() / model.name).symlink_to(WEIGHTS / "guider_base")
