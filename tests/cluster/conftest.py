"""Fixtures of the tests of commands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def inspect_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare tensors in this process: importing torch in a child takes seconds. One test starts the child."""

    def inspect(sources: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        from actors.engine.inspection import inspect_sources

        return inspect_sources(sources)

    monkeypatch.setattr("cluster.checkpoints.inspect_in_child", inspect)
