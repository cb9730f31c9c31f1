"""`make serve`: what it prints, a taken port, and that nothing is left when it stops."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import ray
import yaml
from ray import serve
from ray.exceptions import RayError
from ray.serve.schema import DeploymentStatus, DeploymentStatusOverview, DeploymentStatusTrigger
from rich.console import Console

from cluster.launch import (
    LOOPBACK,
    OBJECT_STORE_BYTES,
    LaunchError,
    claimed_port,
    free_port,
    local_ray,
    running_service,
)
from cluster.serve import (
    FORCED,
    NOT_STARTED,
    READY,
    STARTING,
    UNSOUND,
    Board,
    Service,
    StopSignals,
    await_ready,
    board,
    in_foreground,
    limit_size,
    main,
    own_terminal,
    states_of,
)
from cluster.serve_file import read_service_config
from tests.support.local_ray import READY_S, ROOT

NOT_SCHEDULED = (
    "Deployment x has 1 replicas that have taken more than 30s to be scheduled. Resources required for each replica: "
    '{"CPU": %s}, total resources available: {"CPU": 0.95}. Use `ray status` for more details.'
)


@dataclass
class Running:
    """`python -m cluster.serve` in the background, as a script's `make serve &` starts it: with SIGINT ignored."""

    process: subprocess.Popen[str]

    def until(self, words: str) -> list[str]:
        """The lines up to one that has these words; fails the test where the output ends before."""
        lines = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            lines.append(line.rstrip("\n"))
            if words in line:
                return lines
        pytest.fail(f"{words!r} was not printed:\n" + "\n".join(lines))

    def rest(self) -> list[str]:
        """The lines that follow, up to the end of the process."""
        assert self.process.stdout is not None
        return self.process.stdout.read().splitlines()

    def children(self) -> list[psutil.Process]:
        found: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return found


@contextlib.contextmanager
def serving(file: Path, **environment: str) -> Iterator[Running]:
    settings = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "VERBOSE")}
    process = subprocess.Popen(
        ["/bin/sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-m", "cluster.serve", str(file)],
        cwd=ROOT,
        env=settings | {"PYTHONUNBUFFERED": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield Running(process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(READY_S)
        process.kill()
        process.communicate()


def written(folder: Path, **args: Any) -> tuple[Path, int]:
    """The repository's file with a free port of the loopback interface, and the port."""
    file = yaml.safe_load((ROOT / "ray_config.yaml").read_text(encoding="utf-8"))
    port = free_port()
    file["http_options"] = {"host": LOOPBACK, "port": port}
    file["applications"][0]["args"] |= args
    path = folder / "ray_config.yaml"
    path.write_text(yaml.safe_dump(file), encoding="utf-8")
    return path, port


def alive(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


@contextlib.contextmanager
def listener(host: str, *options: int) -> Iterator[int]:
    """The port of another program's listening socket."""
    with socket.socket() as other:
        for option in options:
            other.setsockopt(socket.SOL_SOCKET, option, 1)
        other.bind((host, 0))
        other.listen()
        yield other.getsockname()[1]


@pytest.mark.parametrize("host", [LOOPBACK, "0.0.0.0"])  # noqa: S104
@pytest.mark.parametrize("options", [[], [socket.SO_REUSEADDR], [socket.SO_REUSEADDR, socket.SO_REUSEPORT]])
def test_a_port_with_another_listener_is_refused(host: str, options: list[int]) -> None:
    with listener(host, *options) as port:
        with pytest.raises(LaunchError, match=rf"port {port} of {LOOPBACK} is taken: .*http_options\.port"):
            with claimed_port(LOOPBACK, port):
                pass


def test_a_taken_port_is_reported_with_its_process() -> None:
    with listener(LOOPBACK) as port:
        holder = rf"{re.escape(psutil.Process().name())}, process {os.getpid()}, listens on {LOOPBACK}:{port}"
        with pytest.raises(LaunchError, match=holder), claimed_port(LOOPBACK, port):
            pass


def test_a_claimed_port_admits_the_proxy_and_no_second_claim() -> None:
    port = free_port()
    with claimed_port(LOOPBACK, port):
        with pytest.raises(LaunchError, match="is taken"), claimed_port(LOOPBACK, port):
            pass
        with socket.socket() as proxy:  # binds as Serve's does
            proxy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            proxy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            proxy.bind((LOOPBACK, port))
            proxy.listen()
            for _ in range(10):  # none goes to the claim
                with socket.create_connection((LOOPBACK, port), timeout=READY_S), proxy.accept()[0] as accepted:
                    accepted.close()
    with claimed_port(LOOPBACK, port):
        pass  # although closed connections linger


def test_a_host_that_is_not_of_this_machine_is_refused() -> None:
    with pytest.raises(LaunchError, match="cannot be used"), claimed_port("192.0.2.77", free_port()):
        pass


def deployment(status: str, message: str = "") -> DeploymentStatusOverview:
    trigger = DeploymentStatusTrigger.CONFIG_UPDATE_STARTED
    return DeploymentStatusOverview(DeploymentStatus(status), trigger, {}, message)


def test_states_name_failures_and_lacking_resources() -> None:
    deployments = {
        "Target": deployment(
            "UPDATING", "A replica failed to start. Error:\nTraceback\nTimeoutError: target: too slow\n"
        ),
        "Guider": deployment("UPDATING", NOT_SCHEDULED % 4),
        "GuiderBase": deployment("UPDATING", NOT_SCHEDULED % 0.2),
        "Router": deployment("HEALTHY"),
    }
    assert states_of("thinklogit", deployments) == {
        "directory": STARTING,
        "target": "failed: TimeoutError: target: too slow",
        "guider": "starting: needs 4 CPU, 0.95 free",
        "guider_base": STARTING,
        "coordinator": STARTING,
        "router": READY,
    }


def test_away_from_a_terminal_each_change_is_a_line() -> None:
    printed = io.StringIO()
    parts = Board(Console(file=printed), None)
    parts.show({"Ray": STARTING})
    parts.show({"target": STARTING, "guider": "loading 0.6 MB of weights"})
    parts.show({"target": READY, "guider": "loading 0.6 MB of weights"})
    assert printed.getvalue().splitlines() == [
        "Ray: starting",
        "target: starting",
        "guider: loading 0.6 MB of weights",
        "target: ready",
    ]


@contextlib.contextmanager
def pipe_ends() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


@contextlib.contextmanager
def terminal_ends() -> Iterator[tuple[int, int]]:
    """A terminal that is not the controlling one of this process, as after setsid."""
    controller, terminal = pty.openpty()
    yield controller, terminal
    os.close(terminal)
    os.close(controller)


@pytest.mark.parametrize("ends", [pipe_ends, terminal_ends])
def test_forced_colors_do_not_redraw_lines_off_the_foreground(
    ends: Callable[[], contextlib.AbstractContextManager[tuple[int, int]]],
) -> None:
    with ends() as (reader, writer):
        assert not in_foreground(writer)
        with open(writer, "w", encoding="utf-8", closefd=False) as file:
            with board(Console(file=file, force_terminal=True), plain=False) as parts:
                parts.show({"Ray": STARTING})
        assert os.read(reader, 100).splitlines() == [b"Ray: starting"]


def test_the_foreground_of_a_controlling_terminal_is_recognized() -> None:
    code = "import os; os.open(os.ttyname(1), os.O_RDWR)\n"  # the first terminal of a new session controls it
    code += "from cluster.serve import in_foreground; print('in foreground:', in_foreground(1))"
    with terminal_ends() as (controller, terminal):
        command = [sys.executable, "-c", code]
        subprocess.run(command, cwd=ROOT, stdout=terminal, start_new_session=True, timeout=READY_S, check=True)
        assert os.read(controller, 100).strip() == b"in foreground: True"


def test_a_deleted_log_file_is_still_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.serve.LOG_BYTES", 8)
    with own_terminal(verbose=False) as (_, log):
        assert log is not None
        log.unlink()
        os.write(1, b"eight by")
        limit_size(1)
        size = os.fstat(1).st_size
        os.write(1, b"t")
        limit_size(1)
        size_after = os.fstat(1).st_size
    assert (size, size_after) == (8, 0)


def test_an_application_that_is_deleted_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.serve.serve.status", lambda: SimpleNamespace(applications={}))
    with pytest.raises(LaunchError, match="the application thinklogit was deleted while it started"):
        await_repository_service()


def test_a_ray_that_ends_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def status() -> None:
        raise RayError("the controller died")

    monkeypatch.setattr("cluster.serve.serve.status", status)
    with pytest.raises(LaunchError, match="ended while the service started: the controller died"):
        await_repository_service()


def await_repository_service() -> None:
    service = Service("thinklogit", f"http://{LOOPBACK}:1", joined=False)
    parts = Board(Console(file=io.StringIO()), None)
    await_ready(service, read_service_config(ROOT / "ray_config.yaml"), StopSignals(), parts)


def test_only_a_ray_for_the_service_alone_has_a_small_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    inits: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        inits.append(options)
        raise RuntimeError("enough")

    monkeypatch.setattr("cluster.launch.ray", SimpleNamespace(init=init, shutdown=lambda: None))
    monkeypatch.setattr("cluster.launch.SETTINGS", {})
    monkeypatch.setattr("cluster.launch.bind", lambda config, load: None)
    with pytest.raises(LaunchError), local_ray():  # as `make serve` calls it
        pass
    with pytest.raises(LaunchError), running_service(read_service_config(ROOT / "ray_config.yaml")):
        pass
    assert [options.get("object_store_memory") for options in inits] == [None, OBJECT_STORE_BYTES]


@pytest.fixture
def handlers_kept() -> Iterator[None]:
    """The handlers of signals that `main` sets are as before after the test."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers_kept")
def test_a_misspelt_key_exits_with_2_and_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, _ = written(tmp_path, guidance={"alhpa": 1.0})
    assert main([str(file)]) == UNSOUND
    (line,) = capsys.readouterr().out.splitlines()
    assert "guidance.alhpa: unknown key" in line
    assert not ray.is_initialized()


@pytest.mark.usefixtures("handlers_kept")
def test_a_missing_model_exits_with_2_and_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = yaml.safe_load((ROOT / "ray_config.yaml").read_text(encoding="utf-8"))["applications"][0]["args"]["models"]
    models["guider"]["path"] = "/nowhere/guider"
    file, _ = written(tmp_path, models=models)
    assert main([str(file)]) == UNSOUND
    assert "there is no folder /nowhere/guider" in capsys.readouterr().out
    assert not ray.is_initialized()


def test_make_help_lists_every_target() -> None:
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    printed = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    described = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert sorted(described) == sorted(targets.split())


SECOND_SIGNAL = """
import subprocess, sys, time
from cluster.serve import StopSignals, adopt_orphans
signals = StopSignals()
signals.install()
adopt_orphans()
orphan = "import subprocess as s; print(s.Popen(['sleep', '600'], stdout=s.DEVNULL).pid)"
pid = subprocess.run([sys.executable, "-c", orphan], stdout=subprocess.PIPE, text=True).stdout
try:
    print(pid, end='', flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    print("first", flush=True)
try:
    signals.check()
except KeyboardInterrupt:
    print("kept", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_kills_all_processes(number: signal.Signals) -> None:
    ignoring = 'trap "" INT; exec "$@"'
    command = ["/bin/sh", "-c", ignoring, "sh", sys.executable, "-c", SECOND_SIGNAL]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        orphan = psutil.Process(int(process.stdout.readline()))
        process.send_signal(number)
        assert process.stdout.readline() == "first\n"
        assert process.stdout.readline() == "kept\n"
        process.send_signal(number)
        assert process.wait(READY_S) == FORCED
        assert alive([orphan]) == []


@pytest.mark.ray
@pytest.mark.slow
def test_a_service_starts_alone_on_its_port_and_stops_whole(tmp_path: Path) -> None:
    file, port = written(tmp_path)
    url = f"http://{LOOPBACK}:{port}"
    with serving(file) as service:
        lines = service.until("Ready after")
        assert httpx.get(f"{url}/ready", timeout=READY_S).json() == {"status": "ready"}
        for part in ("Ray", "Ray Serve", "directory", "target", "guider", "guider_base", "coordinator", "router"):
            assert f"{part}: ready" in lines
        pid = service.process.pid
        offered = f"playground {url}/, API {url}/v1, metrics {url}/metrics; to stop: Ctrl-C, or kill {pid}"
        assert re.fullmatch(rf"Ready after \d+ s: {re.escape(offered)}", lines[-1])
        log = Path(lines[0].split("Ray's log: ")[1])
        assert "Deploying new version of Deployment(name='Target'" in log.read_text(encoding="utf-8")
        with serving(file) as second:
            refusal = second.rest()
            assert second.process.wait(READY_S) == NOT_STARTED
        assert any(f"port {port} of {LOOPBACK} is taken" in line for line in refusal)
        assert httpx.get(f"{url}/ready", timeout=READY_S).status_code == 200
        started = service.children()
        assert len(started) > 8  # Ray's own, a controller, a proxy, six replicas
        service.process.send_signal(signal.SIGINT)
        assert service.rest()[0].startswith("Stopping")
        assert service.process.wait(READY_S) == 0
    assert alive(started) == []
    log.unlink()


@pytest.mark.ray
@pytest.mark.slow
def test_a_signal_while_ray_starts_leaves_no_process(tmp_path: Path) -> None:
    file, _ = written(tmp_path)
    with serving(file) as service:
        service.until("Ray: starting")
        until = time.monotonic() + READY_S
        while not (started := service.children()):
            assert time.monotonic() < until
            time.sleep(0.01)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(READY_S) == 0
    assert alive(started) == []


@pytest.mark.ray
@pytest.mark.slow
def test_a_role_that_does_not_load_ends_the_start_with_its_reason(tmp_path: Path) -> None:
    file, _ = written(tmp_path, deadlines={"model_load_s": 0.01})
    with serving(file) as service:
        service.until("Ray Serve: ready")
        started = service.children()
        error = next(line for line in service.rest() if line.startswith("error"))
        assert service.process.wait(READY_S) == NOT_STARTED
    assert "did not load within deadlines.model_load_s (0.01 s)" in error
    assert alive(started) == []


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("no_shared_ray")
def test_a_cluster_of_others_keeps_running_without_the_application(tmp_path: Path) -> None:
    file, port = written(tmp_path)
    with local_ray(num_cpus=2, namespace="serve"):
        address = ray.get_runtime_context().gcs_address
        with serving(file, RAY_ADDRESS=address) as service:
            service.until("Ready after")
            assert httpx.get(f"http://{LOOPBACK}:{port}/ready", timeout=READY_S).status_code == 200
            assert service.children() == []
            service.process.send_signal(signal.SIGTERM)
            assert service.process.wait(READY_S) == 0
        assert serve.status().applications == {}
        assert serve.status().proxies
