"""CPU time of this process and its descendants, by what they are: Serve's replicas, its proxy, the client. Linux."""

from __future__ import annotations

import os
import re
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def busy_seconds() -> dict[str, float]:
    """Seconds of CPU, user and system, since each process began; processes of one name are added up."""
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents[int(folder.name)] = int(fields[1])
        seconds[int(folder.name)] = (int(fields[11]) + int(fields[12])) * _TICK_S
    busy: dict[str, float] = {}
    for pid in parents:
        if _descends(pid, os.getpid(), parents):
            name = _name(pid)
            busy[name] = busy.get(name, 0.0) + seconds[pid]
    return busy


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
