"""The GPUs of this machine according to nvidia-smi, so that torch need not be imported."""

from __future__ import annotations

import shutil
import subprocess

_TIMEOUT_S = 20  # an idle driver takes seconds to wake up


def gpu_memory() -> list[int]:
    """Bytes of memory of each GPU; empty without a GPU or a driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)  # noqa: S603
        return [int(line) * 2**20 for line in answer.stdout.split()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
