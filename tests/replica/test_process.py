"""Settings of a process: the thread that loads a model, OpenMP workers and garbage collection."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading

import pytest

from actors.replica.process import COLLECT, SPIN, collect_rarely, on_temporary_thread, spin_briefly


def test_the_temporary_thread_has_ended_when_its_result_is_returned() -> None:
    maker = on_temporary_thread(threading.current_thread)
    assert maker is not threading.current_thread()
    assert not maker.is_alive()


def test_an_error_on_the_temporary_thread_reaches_the_caller() -> None:
    def fail() -> None:
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        on_temporary_thread(fail)


@pytest.mark.parametrize(
    ("given", "set_to"),
    [({}, SPIN[1]), ({SPIN[0]: "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, None)],
    ids=["by default", "as the user has it", "not against the user's policy"],
)
def test_openmp_workers_spin_briefly_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], set_to: str | None
) -> None:
    for name in (SPIN[0], "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    spin_briefly()
    assert os.environ.get(SPIN[0]) == set_to


def test_garbage_is_collected_rarely_and_existing_objects_never() -> None:
    before = gc.get_threshold()
    try:
        collect_rarely()
        assert gc.get_threshold() == COLLECT
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)


def test_freed_memory_is_returned_to_the_system() -> None:
    """In a process of its own, whose memory nothing else changes."""
    script = """
import ctypes
from actors.replica.process import return_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

many = [bytearray(1_000) for _ in range(200_000)]
last = bytearray(1_000)  # above them, so that the heap cannot shrink from its end
full = resident()
del many
kept = resident()
return_freed_memory()
print(full - kept, full - resident())
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    kept, returned = map(int, found.split())
    assert returned > 150_000_000
    assert returned > kept
