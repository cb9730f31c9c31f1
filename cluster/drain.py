"""Empty this Ray node before its machine or pod goes: its replicas are started elsewhere, then told to stop.

    python -m cluster.drain --seconds 600

Returns once no Serve replica runs on this machine, or after so many seconds: a replacement loads its weights before the
replica here is told to stop. The node takes nothing new from then on, so end it afterwards. Pods of
cluster/kuberay.yaml do this before they are stopped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

REPLICA = b"ray::ServeReplica"  # how Ray names the processes of Serve's replicas
POLL_S = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Drain; the exit status: 0 when nothing is left, 1 when time was up."""
    parser = argparse.ArgumentParser(prog="python -m cluster.drain", description="Empty this Ray node.")
    parser.add_argument("--seconds", type=int, default=600, help="how long replicas may take to move")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.seconds
    refusal = ask_for_drain(options.seconds)
    if refusal:
        print(f"not drained by this call: {refusal}", file=sys.stderr)  # by the autoscaler's perhaps: wait all the same
    while left := replicas_here():
        if time.monotonic() > deadline:
            print(f"{len(left)} replicas are still here: {', '.join(map(str, left))}", file=sys.stderr)
            return 1
        time.sleep(POLL_S)
    return 0


def ask_for_drain(seconds: int) -> str:
    """Tell Ray that this node goes in so many seconds; why it refused, or an empty text."""
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the machine is going away"]
    command = ["ray", "drain-node", *reason, "--deadline-remaining-seconds", str(seconds)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stderr.strip() if done.returncode else ""


def replicas_here(processes: Path = Path("/proc")) -> list[int]:
    """Process ids of the Serve replicas on this machine, or in this container."""
    found = []
    for folder in processes.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended
        if command.startswith(REPLICA):
            found.append(int(folder.name))
    return sorted(found)


if __name__ == "__main__":
    sys.exit(main())
