"""Peak resident memory of processes, from any moment on. Linux only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

_FORGET_PEAK = "5"  # what proc(5) wants in clear_refs


def forget_peak(process: int | Literal["self"]) -> None:
    """Begin the peak of a process, which has an id, again at what is resident now."""
    Path(f"/proc/{process}/clear_refs").write_text(_FORGET_PEAK, encoding="utf-8")


def peak(process: int | Literal["self"]) -> int:
    """Bytes of a process's resident set at its peak since `forget_peak`, or since it began."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None, "the kernel reports no VmHWM"
    return int(found.group(1)) << 10


class PeakMemory:
    """Memory of the process in which the object is. Pages of files that processes share count in each of them."""

    def forget_peak_memory(self) -> None:
        """Begin the peak again at what is resident now."""
        forget_peak("self")

    def peak_memory(self) -> int:
        """Bytes of the resident set at its peak since `forget_peak_memory`, or since the process began."""
        return peak("self")
