"""The hardware that models compute on: its names, equal for two models exactly if they share it, and turns to load."""

from __future__ import annotations

import contextlib
import fcntl
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from actors.engine.errors import LoadError

LOAD_S = 1_800.0  # deadline of other roles that load on the same GPU
_TURN_S = 0.2  # how often a role that waits for its turn looks again
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def device_name(device: torch.device) -> str:
    """A GPU's own id; the processors of a machine have the id of its last boot, containers included."""
    if device.type == "cuda":
        return f"gpu-{torch.cuda.get_device_properties(device).uuid}"
    return f"{device.type}-{_BOOT_ID.read_text().strip() if _BOOT_ID.exists() else 'local'}"


@contextlib.contextmanager
def loading_alone(device: torch.device, path: str, wait_s: float = LOAD_S) -> Iterator[None]:
    """A turn on a GPU: loading roles measure its memory, so that roles which share one load one after another.

    On a CPU it does nothing. Raises LoadError for the model at `path` after `wait_s` seconds.
    """
    if device.type != "cuda":
        yield
        return
    name = device_name(device)
    file, until = Path(tempfile.gettempdir()) / f"thinklogit-{name}.lock", time.monotonic() + wait_s
    try:
        lock = file.open("w")
    except OSError as error:
        raise LoadError(path, f"{file} cannot be written: {error}", "Remove it, or set TMPDIR.") from error
    with lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    why = f"another role has been loading on {name} for {wait_s:g} s"
                    raise LoadError(path, why, "Look at the log of the roles on that GPU.") from None
                time.sleep(_TURN_S)
        yield
