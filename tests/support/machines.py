"""A Ray cluster over hosts of their own, with TLS and token authentication, and the application on it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from benchmarks.hosts import Host, Network, hosts
from cluster.launch import OBJECT_STORE_BYTES
from tests.support.certificates import ray_tls_settings
from tests.support.local_ray import APPLICATION, READY_S, ROOT, SETTINGS, trio_args, wait_until

GCS_PORT, HTTP_PORT = 6379, 8000  # each host has all ports for itself
STOP_S = 10.0


@dataclass(frozen=True, slots=True)
class Machines:
    """A running cluster: the head's host first, then a host for each mapping of labels."""

    network: Network
    environment: dict[str, str]

    @property
    def head(self) -> Host:
        return self.network.hosts[0]

    @property
    def url(self) -> str:
        return f"http://{self.head.address}:{HTTP_PORT}"

    def driver(self, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a program on the head's host that has `ADDRESS` to give to `ray.init`."""
        setup = f"import json, ray\nADDRESS = '{self.head.address}:{GCS_PORT}'\n"
        command = [sys.executable, "-W", "ignore", "-c", setup + code]
        with self.head.inside():
            return subprocess.run(
                command,
                env=self.environment | environment,
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=READY_S,
                check=False,
            )

    def answer(self, code: str) -> Any:
        """The JSON in the last line that a connected driver prints."""
        connect = "ray.init(ADDRESS, namespace='serve', log_to_driver=False, configure_logging=False)\n"
        done = self.driver(connect + code)
        assert done.returncode == 0, done.stderr[-2_000:]
        return json.loads(done.stdout.splitlines()[-1])

    def deploy(self, args: dict[str, Any], folder: Path) -> None:
        """`serve run` of a config file on the head's host, until every role is there."""
        file = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": self.head.address, "port": HTTP_PORT},
            "applications": [
                {"name": APPLICATION, "route_prefix": "/", "import_path": "router.app:build", "args": args}
            ],
        }
        path = folder / "application.yaml"
        path.write_text(yaml.safe_dump(file))
        address = f"{self.head.address}:{GCS_PORT}"
        command = [sys.executable, "-m", "ray.serve.scripts", "run", "--non-blocking", "--address", address, str(path)]
        with self.head.inside():
            done = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2_000:]
        wait_until(self._ready, "every role being there")

    def _ready(self) -> bool:
        with self.head.inside():
            try:
                return httpx.get(f"{self.url}/ready", timeout=READY_S).status_code == 200
            except httpx.TransportError:
                return False


@contextlib.contextmanager
def machines(labels: Sequence[dict[str, str]], folder: Path, delay_s: float) -> Iterator[Machines]:
    """A head and one node for each mapping of labels, each on a host of its own. Raises NoHosts."""
    with hosts(1 + len(labels), delay_s) as network, contextlib.ExitStack() as stack:
        addresses = [host.address for host in network.hosts]
        settings = ray_tls_settings(folder, ["127.0.0.1", *addresses])
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        environment = {**os.environ, **SETTINGS, **settings, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        scratch = tempfile.mkdtemp(prefix="rm-", dir="/tmp")  # short: Ray's sockets lie in it
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        own = [f"--temp-dir={scratch}/{number}" for number in range(len(addresses))]
        head = ["--head", f"--port={GCS_PORT}", "--num-cpus=2", "--include-dashboard=false", own[0]]
        stack.enter_context(_node(network.hosts[0], environment, head))
        join = [f"--address={addresses[0]}:{GCS_PORT}", "--num-cpus=1"]
        for host, mapping, folder_of_host in zip(network.hosts[1:], labels, own[1:], strict=True):
            named = ",".join(f"{name}={value}" for name, value in mapping.items())
            stack.enter_context(_node(host, environment, [*join, f"--labels={named}", folder_of_host]))
        yield Machines(network, environment)


@contextlib.contextmanager
def _node(host: Host, environment: dict[str, str], options: Sequence[str]) -> Iterator[None]:
    """`ray start` on a host, until it says that it runs; then everything that runs on that host is ended."""
    common = [f"--node-ip-address={host.address}", f"--object-store-memory={OBJECT_STORE_BYTES}", "--block"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options, *common, "--disable-usage-stats"]
    with tempfile.TemporaryFile("w+") as output:
        with host.inside():
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            wait_until(lambda: _says(output, "Ray runtime started") or process.poll() is not None, "a node's start")
            if process.poll() is not None:
                pytest.fail(f"ray start ended: {_text(output)[-2_000:]}")
            yield
        finally:
            _end_all(host, process)


def _says(output: Any, words: str) -> bool:
    return words in _text(output)


def _text(output: Any) -> str:
    return os.pread(output.fileno(), 1 << 20, 0).decode()


def _end_all(host: Host, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + STOP_S
    while (left := _processes(host)) and time.monotonic() < until:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    process.wait(STOP_S)


def _processes(host: Host) -> list[int]:
    """Process ids on a host, but for this process."""
    shown = subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, text=True, check=True).stdout
    return [pid for pid in map(int, shown.split()) if pid != os.getpid()]


def roles_apart() -> dict[str, Any]:
    """The batch-invariant trio: the target on the node labelled large, both small models on the one labelled small."""
    args = trio_args() | {
        "batch_invariant": True,
        "deadlines": {"step_s": 3, "connect_s": 2, "reconnect_timeout_s": 60},
    }
    for role, model in args["models"].items():
        model["label_selector"] = {"thinklogit-node": "large" if role == "target" else "small"}
    return args
