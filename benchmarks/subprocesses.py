"""Programs of others as subprocesses that end, with all processes below them, when the caller is done."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil


@contextmanager
def subprocess_of(
    command: Sequence[str], environment: Mapping[str, str], log: Path, patience_s: float = 0.0, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """A subprocess whose standard error goes to `log`.

    At the end of the context it is asked to end, and killed after `patience_s` seconds. options: of `Popen`.
    """
    with log.open("w") as errors:
        own: dict[str, Any] = {"text": True, "start_new_session": True}  # a session is a group of processes, too
        process = subprocess.Popen(command, env=environment, stderr=errors, **own, **options)  # noqa: S603
    try:
        yield process
    finally:
        kill(process, patience_s)
        process.communicate()


def kill(process: subprocess.Popen[str], patience_s: float = 0.0) -> None:
    """End a process that may take so many seconds to end itself; kill its group, and all processes below it."""
    below: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True)
    if patience_s:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for each in below:
        with suppress(psutil.NoSuchProcess):
            each.kill()


def last_lines(log: Path, count: int = 5) -> str:
    """The end of a log, on one line."""
    return " | ".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-count:])
