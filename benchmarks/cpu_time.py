"""CPU time of this process and its descendants by kind: Serve's replicas, its proxy, the client. Linux only."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def busy_seconds() -> dict[str, float]:
    """Seconds of CPU, user and system, since each process began; processes of one name are added up."""
    fields = _fields()
    parents = {pid: int(of[1]) for pid, of in fields.items()}
    seconds = {pid: (int(of[11]) + int(of[12])) * _TICK_S for pid, of in fields.items()}
    busy: dict[str, float] = {}
    for pid in parents:
        if _descends(pid, os.getpid(), parents):
            name = _name(pid)
            busy[name] = busy.get(name, 0.0) + seconds[pid]
    return busy


def descendants(ancestor: int) -> list[int]:
    """All processes below a process."""
    parents = {pid: int(of[1]) for pid, of in _fields().items()}
    return [pid for pid in parents if pid != ancestor and _descends(pid, ancestor, parents)]


def _fields() -> dict[int, list[str]]:
    """Fields of /proc/PID/stat of each process, from its state on."""
    fields = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            fields[int(folder.name)] = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return fields


def _descends(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid and pid != ancestor:
        pid = parents.get(pid, 0)
    return pid == ancestor


def _name(pid: int) -> str:
    try:
        command = (Path("/proc") / str(pid) / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return "other"
    if found := re.match(r"ray::ServeReplica:[^:]+:(\w+)", command):
        return found.group(1)
    if command.startswith("ray::ProxyActor"):
        return "Proxy"
    return "client" if "spawn_main" in command else "other"
