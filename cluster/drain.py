"""Drains this Ray node before its machine or pod is removed: Serve starts its replicas elsewhere, then stops them here.

    python -m cluster.drain --seconds 600

Returns when no Serve replica runs on this machine any more, or after that many seconds. A replacement loads its weights
before Serve stops the replica here. The node accepts no new work afterwards, so remove it. Pods of cluster/kuberay.yaml
run this command before they stop.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

REPLICA = b"ray::ServeReplica"  # Ray's process title of a Serve replica begins with it
POLL_S = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Drain the node. Returns the exit status: 0 if no replica is left, 1 if time ran out."""
    parser = argparse.ArgumentParser(prog="python -m cluster.drain", description="Drain this Ray node.")
    parser.add_argument("--seconds", type=int, default=600, help="time for replicas to move")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.seconds
    refusal = request_drain(options.seconds)
    if refusal:
        print(f"Ray refused to drain this node: {refusal}", file=sys.stderr)
        # The autoscaler may be draining it already: wait all the same.
    while left := local_replicas():
        if time.monotonic() > deadline:
            print(f"{len(left)} replicas still run here: {', '.join(map(str, left))}", file=sys.stderr)
            return 1
        time.sleep(POLL_S)
    return 0


def request_drain(seconds: int) -> str:
    """Ask Ray to drain this node within `seconds`. Returns Ray's error message, empty if it agreed."""
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the machine is going away"]
    command = ["ray", "drain-node", *reason, "--deadline-remaining-seconds", str(seconds)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stderr.strip() if done.returncode else ""


def local_replicas(processes: Path = Path("/proc")) -> list[int]:
    """Process ids of the Serve replicas on this machine or in this container."""
    found = []
    for folder in processes.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue  # the process has ended
        if command.startswith(REPLICA):
            found.append(int(folder.name))
    return sorted(found)


if __name__ == "__main__":
    sys.exit(main())
