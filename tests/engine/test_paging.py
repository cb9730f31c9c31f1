"""Memory of weights that are hardly read again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from actors.engine.paging import page_out

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be asked to drop pages")
MILLIONS = 20  # of values of the weight: 80 MB


def test_pages_of_a_file_are_given_back_and_read_again(tmp_path: Path) -> None:
    """In a process of its own, whose memory nothing else changes."""
    file = tmp_path / "weights.safetensors"
    save_file({"weight": torch.arange(MILLIONS * 1_000_000, dtype=torch.float32)}, file)
    with file.open("rb") as written:
        os.fsync(written.fileno())  # pages that are not on the disk yet stay
    script = f"""
from safetensors.torch import load_file
from actors.engine.paging import page_out

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

weight = load_file("{file}")["weight"]
weight[0] = 7.0  # a changed page
total = weight.double().sum()
full = resident()
page_out(weight)
print(full - resident(), weight[0] == 7.0, weight.double().sum() == total)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    returned, kept, equal = found.split()
    assert int(returned) > MILLIONS * 3_500_000
    assert (kept, equal) == ("tensor(True)", "tensor(True)")


def test_memory_without_a_file_keeps_its_values() -> None:
    tensor = torch.randn(1_000_000)
    before = tensor.clone()
    page_out(tensor)
    assert torch.equal(tensor, before)
    page_out(torch.empty(0))  # nothing to give back
