"""Each kind of engine step on fake CUDA tensors: what a CPU can tell of copies and waits on a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.deadlines import HANG_S

COMPILER = shutil.which(os.environ.get("CXX", "c++"))
SUPPORT = Path(__file__).parents[1] / "support"


pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler, with which fake CUDA tensors are enabled"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA, whose guard is another"),
]


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """By step what was done on which stream (tests.support.fake_cuda)."""
    assert COMPILER is not None
    installed, library = Path(torch.__file__).parent, tmp_path_factory.mktemp("fake_cuda") / "guard.so"
    flags = ["-shared", "-fPIC", "-std=c++20", f"-I{installed / 'include'}", str(SUPPORT / "cuda_guard.cpp")]
    linked = [f"-L{installed / 'lib'}", "-lc10", f"-Wl,-rpath,{installed / 'lib'}"]  # behind what uses it
    command = [COMPILER, *flags, *linked, "-o", str(library)]
    subprocess.run(command, check=True, timeout=HANG_S)
    command = [sys.executable, "-m", "tests.support.fake_cuda", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 0, done.stderr
    traces: dict[str, list[str]] = json.loads(done.stdout)
    return traces


def test_a_step_copies_once_to_the_device_and_never_waits(traces: dict[str, list[str]]) -> None:
    steps = ("a prompt", "two prompts", "a decode step", "a check of drafts", "a mix of all")
    for number, name in enumerate(steps, 1):
        assert traces[name] == ["forwards: copy", "forwards: kernels", f"forwards: record {number}"]


def test_a_reduction_follows_its_forward_on_the_same_stream(traces: dict[str, list[str]]) -> None:
    after = ["forwards: copy", "forwards: kernels", "forwards: read cuda"]  # temperatures, or the rows that it takes
    assert traces["a reduction"] == ["forwards: kernels", *after]
    assert traces["a reduction of rows apart"] == after


def test_lookups_have_a_stream_that_waits_for_their_own_forwards_alone(traces: dict[str, list[str]]) -> None:
    read = ["look-ups: copy", "look-ups: kernels", "look-ups: read cuda"]
    assert traces["a look-up"] == ["look-ups: wait for 5", *read]
    assert traces["a look-up in two forwards' rows"] == ["look-ups: wait for 5", "look-ups: wait for 1", *read]
    for name in ("a widening", "a whole row"):
        assert traces[name] == ["look-ups: wait for 5", *read[1:]]


def test_a_row_is_found_once_the_device_has_computed_it(traces: dict[str, list[str]]) -> None:
    assert traces["found while computed"] == ["None"]
    assert traces["found afterwards"] == ["0"]
