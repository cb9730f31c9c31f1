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


@pytest.fixture
def guard(tmp_path: Path) -> Path:
    """The library that lets torch's CPU build have fake tensors on CUDA."""
    assert COMPILER is not None
    installed, library = Path(torch.__file__).parent, tmp_path / "guard.so"
    flags = ["-shared", "-fPIC", "-std=c++20", f"-I{installed / 'include'}", str(SUPPORT / "cuda_guard.cpp")]
    linked = [f"-L{installed / 'lib'}", "-lc10", f"-Wl,-rpath,{installed / 'lib'}"]  # behind what uses it
    command = [COMPILER, *flags, *linked, "-o", str(library)]
    subprocess.run(command, check=True, timeout=HANG_S)
    return library


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler, with which fake CUDA tensors are enabled")
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA, whose guard is another")
def test_a_step_copies_once_to_the_device_and_never_waits(guard: Path) -> None:
    command = [sys.executable, "-m", "tests.support.fake_cuda", str(guard)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    steps = ("two prompts", "a decode step", "a check of drafts", "a mix of all")
    assert {name: found.pop(name) for name in steps} == {name: ["copy"] for name in steps}
    # ids or temperatures to the device, and one result back
    assert found == {name: ["copy", "read cuda"] for name in ("a reduction", "a look-up")}
