"""Chooses the attention back end: the first in `BACKENDS` that supports the device and dtype, or a configured one.

To add one (a fused kernel for one device), write a class with `name`, `static` and `attend`
(`actors.engine.attention.AttentionBackend`), add a line to `BACKENDS`, and add the name to `ModelConfig.attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from actors.engine.attention import AttentionBackend
from actors.engine.backends import Gathered, PerSession
from actors.engine.errors import LoadError
from actors.engine.flash import FlashAttention, flash_supported


@dataclass(frozen=True, slots=True)
class BackendEntry:
    """An attention back end, and the devices and dtypes that it supports."""

    build: Callable[[], AttentionBackend]
    supports: Callable[[torch.device, torch.dtype], bool]


# In order of preference.
BACKENDS: dict[str, BackendEntry] = {
    FlashAttention.name: BackendEntry(FlashAttention, flash_supported),
    PerSession.name: BackendEntry(PerSession, lambda device, dtype: device.type == "cpu"),
    Gathered.name: BackendEntry(Gathered, lambda device, dtype: True),
}


def choose_backend(device: torch.device, dtype: torch.dtype, name: str | None = None) -> AttentionBackend:
    """The back end called `name`, or the first that supports the device and dtype. Raises LoadError if none does."""
    if name is not None and name not in BACKENDS:
        raise LoadError(f"attention back end {name!r}", "unknown", f"Known are: {', '.join(BACKENDS)}.")
    for candidate in BACKENDS if name is None else [name]:
        if BACKENDS[candidate].supports(device, dtype):
            return BACKENDS[candidate].build()
    raise LoadError(f"attention back end {name!r}", f"it does not run on {device} in {dtype}", "Set attention: auto.")
