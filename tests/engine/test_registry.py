from __future__ import annotations

import pytest
import torch

from actors.engine.backends import Gathered, PerSession
from actors.engine.errors import LoadError
from actors.engine.flash import FlashAttention
from actors.engine.registry import BACKENDS, BackendEntry, choose_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_device_and_dtype_choose_the_back_end() -> None:
    assert isinstance(choose_backend(CPU, torch.float32), PerSession)
    assert isinstance(choose_backend(CUDA, torch.float32), Gathered)


def test_a_back_end_can_be_forced_by_name() -> None:
    assert isinstance(choose_backend(CPU, torch.float32, "gathered"), Gathered)
    with pytest.raises(LoadError, match="Known are: flash, per_session, gathered"):
        choose_backend(CPU, torch.float32, "gatherd")
    with pytest.raises(LoadError, match="does not run on cuda"):
        choose_backend(CUDA, torch.bfloat16, "per_session")
    with pytest.raises(LoadError, match="does not run on cpu"):
        choose_backend(CPU, torch.float32, "flash")


def test_flash_is_preferred_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "flash", BackendEntry(FlashAttention, lambda device, dtype: True))
    assert isinstance(choose_backend(CUDA, torch.bfloat16), FlashAttention)
    assert isinstance(choose_backend(CUDA, torch.bfloat16, "gathered"), Gathered)
