"""Peak resident memory of this process, from any moment on. Linux only."""

from __future__ import annotations

import re
from pathlib import Path

_PROCESS = Path("/proc/self")
_FORGET_PEAK = "5"  # what proc(5) wants in clear_refs


class PeakMemory:
    """Memory of the process in which the object is. Pages of files that processes share count in each of them."""

    def forget_peak_memory(self) -> None:
        """Begin the peak again at what is resident now."""
        (_PROCESS / "clear_refs").write_text(_FORGET_PEAK, encoding="utf-8")

    def peak_memory(self) -> int:
        """Bytes of the resident set at its peak since `forget_peak_memory`, or since the process began."""
        found = re.search(r"^VmHWM:\s+(\d+) kB$", (_PROCESS / "status").read_text(encoding="utf-8"), re.MULTILINE)
        assert found is not None, "the kernel reports no VmHWM"
        return int(found.group(1)) << 10
