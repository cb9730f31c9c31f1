"""Names of the hardware that models compute on, equal for two models exactly if they share it."""

from __future__ import annotations

from pathlib import Path

import torch

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def device_name(device: torch.device) -> str:
    """A GPU's own id; the processors of a machine have the id of its last boot, containers included."""
    if device.type == "cuda":
        return f"gpu-{torch.cuda.get_device_properties(device).uuid}"
    return f"{device.type}-{_BOOT_ID.read_text().strip() if _BOOT_ID.exists() else 'local'}"
