"""Roles that share a GPU load one after another."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.engine import devices, loader
from actors.engine.devices import loading_alone
from actors.engine.errors import LoadError
from actors.engine.loader import ModelSource, load_engine
from tests.support.deadlines import HANG_S

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(devices, "device_name", lambda device: f"gpu-{device.index or 0}")
    monkeypatch.setattr("actors.engine.devices.tempfile.gettempdir", lambda: str(tmp_path))


def test_of_two_roles_one_waits_until_the_other_has_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    waits, loaded = threading.Event(), threading.Event()

    def sleep(seconds: float) -> None:
        if not waits.is_set():
            happened.append("the second waits")
        waits.set()
        assert loaded.wait(HANG_S)

    def second() -> None:
        with loading_alone(GPU, "second", HANG_S):
            happened.append("the second loads")

    monkeypatch.setattr("actors.engine.devices.time.sleep", sleep)
    thread = threading.Thread(target=second)
    with loading_alone(GPU, "first"):
        thread.start()
        assert waits.wait(HANG_S)
        happened.append("the first has loaded")
    loaded.set()
    thread.join(HANG_S)
    assert happened == ["the second waits", "the first has loaded", "the second loads"]


def test_a_role_gives_up_at_its_deadline_and_names_the_gpu() -> None:
    with (
        loading_alone(GPU, "first"),
        pytest.raises(LoadError, match="second: another role has been loading on gpu-0 for 0 s"),
        loading_alone(GPU, "second", wait_s=0),
    ):
        pass


def test_other_gpus_and_cpus_wait_for_nobody() -> None:
    with loading_alone(GPU, "first"), loading_alone(torch.device("cuda", 1), "second", 0):
        pass
    with loading_alone(torch.device("cpu"), "first"), loading_alone(torch.device("cpu"), "second", 0):
        pass


def test_a_load_that_fails_gives_its_turn_back() -> None:
    with pytest.raises(LoadError, match="broken"), loading_alone(GPU, "first"):
        raise LoadError("first", "broken", "Mend it.")
    with loading_alone(GPU, "second", wait_s=0):
        pass


def test_a_folder_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("actors.engine.devices.tempfile.gettempdir", lambda: str(tmp_path / "missing"))
    with pytest.raises(LoadError, match="set TMPDIR"), loading_alone(GPU, "first"):
        pass


def test_the_native_engine_reads_no_weights_before_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(*arguments: Any) -> None:
        raise AssertionError("it was not its turn")

    monkeypatch.setattr(loader, "device_of", lambda source: "cuda")
    monkeypatch.setattr(loader, "load_model", load_model)
    monkeypatch.setattr(loader, "loading_alone", partial(loading_alone, wait_s=0))
    with loading_alone(GPU, "first"), pytest.raises(LoadError, match="another role has been loading on gpu-0"):
        load_engine(ModelSource("some/model", device="cuda"), 64)
