"""Runs the service of a Serve config file until Ctrl-C or SIGTERM, and shows the progress of its start.

    python -m cluster.serve ray_config.yaml

Starts a Ray cluster of its own and ends it with all its processes; with RAY_ADDRESS it uses that cluster and deletes
only the applications. Ray's log lines go to a file, with VERBOSE=1 to the terminal. Exit status 0: stopped on request.
1: the service did not start. 2: the configuration is not sound. 130: everything was ended at once, by a second signal
or because stopping took too long.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import math
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import psutil
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import DeploymentStatusOverview, ServeDeploySchema
from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from actors.api.generation import Role
from actors.config import ConfigError, ServiceConfig
from cluster.check import examine, read_with_old_keys, show_config_error
from cluster.check_report import show, show_findings
from cluster.launch import LOOPBACK, LaunchError, claimed_port, join_ray, local_ray
from cluster.serve_file import IMPORT_PATH, read_mapping
from router.app import MODEL_NAMES, STATUS_S

POLL_S = 0.5
START_S = 300.0  # Ray and Serve start within this, and so do processes, before they load models
STOP_S = 20.0  # open requests may end within this
END_S = 20.0  # all processes are gone within this; then they are killed
LOG_BYTES = 64 * 2**20  # a longer file starts again from nothing; Ray's own files have every line
READY, STARTING, FAILED = "ready", "starting", "failed"
NOT_STARTED, UNSOUND, FORCED = 1, 2, 130
PARTS = {"Directory": "directory", **{name: str(role) for role, name in MODEL_NAMES.items()}}
PARTS |= {"Coordinator": "coordinator", "Router": "router"}
WILDCARDS = ("0.0.0.0", "::", "")  # noqa: S104
_RESOURCES = re.compile(r"required for each replica: (\{.*?\}), total resources available: (\{.*?\})")
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of Linux's prctl


class StopSignals:
    """Turns SIGINT, SIGTERM and SIGHUP into KeyboardInterrupt; a second one kills every process at once.

    Handlers are set explicitly: a script's background jobs start with SIGINT ignored, and Ray replaces SIGTERM's.
    """

    def __init__(self) -> None:
        self._received = False
        self.timed_out = False

    def install(self) -> None:
        """Set the handlers. SIGHUP stays ignored where nohup has set it so."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, self._handle)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._handle)

    def limit(self, seconds: float) -> None:
        """Interrupt in so many seconds, as a signal would, and set `timed_out`; 0 takes the limit away."""
        signal.alarm(math.ceil(seconds))

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has come: code that it interrupted may have dropped the exception."""
        if self._received:
            raise KeyboardInterrupt

    def kill_on_next_signal(self) -> None:
        """Kill every process at the next signal, or at the end of the time for stopping."""
        self.install()
        self._received = True
        self.limit(STOP_S + END_S)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            end_children()
            os._exit(FORCED)
        self._received, self.timed_out = True, number == signal.SIGALRM
        raise KeyboardInterrupt


@dataclass(frozen=True, slots=True)
class Service:
    """A deployed application."""

    name: str
    url: str
    joined: bool  # it runs in a Ray cluster that this process has not started


class Board:
    """The state of each part of the service: redrawn in place on a terminal, elsewhere a line for each change."""

    def __init__(self, console: Console, live: Live | None) -> None:
        self._console, self._live = console, live
        self._states: dict[str, str] = {}
        self._spinner = Spinner("line")

    def show(self, states: dict[str, str]) -> None:
        """Show words for parts by name; those that are not named stay as they are."""
        changed = {name: words for name, words in states.items() if self._states.get(name) != words}
        self._states |= changed
        if self._live is None:
            for name, words in changed.items():
                self._console.print(f"{name}: {words}", markup=False, highlight=False, soft_wrap=True)
            return
        grid = Table.grid(padding=(0, 1))
        for name, words in self._states.items():
            ready = words == READY
            grid.add_row(Text("*", "green") if ready else self._spinner, name, Text(words, "green" if ready else ""))
        self._live.update(grid)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the service of one file; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cluster.serve", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="the Serve config file, ray_config.yaml")
    file: Path = parser.parse_args(arguments).file
    signals = StopSignals()
    signals.install()
    try:
        config = checked(file, Console())
        return UNSOUND if config is None else run(file, config, signals)
    except (KeyboardInterrupt, SystemExit):  # Ray's handler of SIGTERM, in place during ray.init, raises SystemExit
        return 0


def checked(file: Path, console: Console) -> ServiceConfig | None:
    """The configuration in a file, or None if it has errors, which are printed. Warnings are printed too."""
    try:
        config, old_keys = read_with_old_keys(file)
        costs, gpus, found = examine(config, schema_of(file).http_options.host, old_keys)
    except ConfigError as error:
        show_config_error(console, file, error)
        return None
    if any(finding.severity == "error" for finding in found):
        show(console, costs, gpus, found)
        return None
    show_findings(console, [finding for finding in found if finding.severity == "warning"])
    return config


def run(file: Path, config: ServiceConfig, signals: StopSignals) -> int:
    """Start the service, wait for a signal and stop it; the exit status."""
    adopt_orphans()
    verbose = os.environ.get("VERBOSE", "0") not in ("", "0")
    status, began = 0, time.monotonic()
    with own_terminal(verbose) as (console, log), ExitStack() as stack:
        stack.callback(end_children)
        console.print(f"Starting {config.name}. Ray's log: {log or 'this terminal'}", highlight=False, soft_wrap=True)
        try:
            with board(console, plain=verbose) as parts:
                service = start(stack, schema_of(file), signals, parts)
                await_ready(service, config, signals, parts)
            ready = f"Ready after {time.monotonic() - began:.0f} s: {addresses(service, config)}"
            console.print(f"{ready}; to stop: Ctrl-C, or kill {os.getpid()}", highlight=False, soft_wrap=True)
            while True:
                signals.check()
                time.sleep(POLL_S)
                if log is not None:
                    limit_size(1)  # standard output, by its descriptor: the file itself may have been deleted
        except LaunchError as error:
            status = NOT_STARTED
            console.print("[bold red]error[/]", Text(str(error)), highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            if signals.timed_out:
                status = NOT_STARTED
                console.print(f"[bold red]error[/] Ray and Serve did not start within {START_S:g} s")
            else:
                words = f"Stopping: open requests may end within {STOP_S:g} s; Ctrl-C again ends them now"
                console.print(words, highlight=False)
        finally:
            signals.kill_on_next_signal()
    return status


def start(stack: ExitStack, schema: ServeDeploySchema, signals: StopSignals, parts: Board) -> Service:
    """Start Ray, Serve and the applications of a Serve config file, as `serve run` does.

    stack: takes what ends them. Raises LaunchError.
    """
    parts.show({"Ray": STARTING})
    signals.limit(START_S)
    options: dict[str, Any] = {
        "runtime_env": {"working_dir": "."},
        "namespace": "serve",
        "log_to_driver": True,
        "logging_level": logging.INFO,
    }
    joined = bool(os.environ.get("RAY_ADDRESS")) and join_ray(**options)
    if joined:
        stack.callback(ray.shutdown)
    else:
        if schema.proxy_location != "Disabled":
            stack.enter_context(claimed_port(schema.http_options.host, schema.http_options.port))
        stack.enter_context(local_ray(dashboard=True, dashboard_port=None, **options))
    signals.install()  # ray.init has replaced that of SIGTERM
    signals.check()
    parts.show({"Ray": READY, "Ray Serve": STARTING})
    try:
        serve.start(
            proxy_location=schema.proxy_location,
            http_options=schema.http_options.model_dump(),
            grpc_options=schema.grpc_options.model_dump(),
            controller_options=schema.controller_options,
        )
        client = _get_global_client()
        stack.callback(delete, [application.name for application in schema.applications])
        client.deploy_apps(schema)
    except Exception as error:
        raise LaunchError(f"Ray Serve did not start: {error}") from error
    signals.limit(0)
    parts.show({"Ray Serve": READY})
    http = client.http_config  # of a Serve that ran before, where the cluster has one
    host = http.host
    if host in WILDCARDS:
        host = ray.get_runtime_context().gcs_address.rsplit(":", 1)[0] if joined else LOOPBACK
    application = next(each for each in schema.applications if each.import_path == IMPORT_PATH)
    prefix = (application.route_prefix or "").rstrip("/")
    return Service(application.name, f"http://{f'[{host}]' if ':' in host else host}:{http.port}{prefix}", joined)


def await_ready(service: Service, config: ServiceConfig, signals: StopSignals, parts: Board) -> None:
    """Return once every part is served and, in a Ray of its own, HTTP answers.

    Raises LaunchError if a deployment fails, if the application is deleted or Ray ends, or after the deadline.
    """
    seconds = START_S + config.deadlines.model_load_s
    until = time.monotonic() + seconds
    states: dict[str, str] = {}
    while time.monotonic() < until:
        signals.check()
        try:
            application = serve.status().applications.get(service.name)
            if application is None:
                raise LaunchError(f"the application {service.name} was deleted while it started")
            states = states_of(service.name, application.deployments)
        except (RayError, RayServeException) as error:
            raise LaunchError(f"Ray or Ray Serve ended while the service started: {error}") from error
        parts.show(states)
        if application.status == "DEPLOY_FAILED":
            reasons = [f"{name}: {words}" for name, words in states.items() if words.startswith(FAILED)]
            raise LaunchError("\n".join(reasons) or application.message)
        complete = application.status == "RUNNING" and set(states.values()) == {READY}
        if complete and (service.joined or answers(service.url)):
            return
        time.sleep(POLL_S)
    waiting = "; ".join(f"{name}: {words}" for name, words in states.items() if words != READY)
    raise LaunchError(f"the service is not ready after {seconds:g} s, see deadlines.model_load_s. {waiting}")


def states_of(application: str, deployments: Mapping[str, DeploymentStatusOverview]) -> dict[str, str]:
    """The state of each deployment in words, by the name of its part."""
    states = {part: STARTING for part in PARTS.values()}
    for name, deployment in deployments.items():
        message = deployment.message.strip()
        if "Error:" in message:  # the text of an exception; Serve starts a replica three times
            states[PARTS[name]] = f"{FAILED}: {message.splitlines()[-1]}"
        elif deployment.status == "HEALTHY":
            states[PARTS[name]] = READY
        elif wanting := lacking(message):
            states[PARTS[name]] = f"{STARTING}: {wanting}"
    if states["directory"] == READY:
        with suppress(TimeoutError, RayError, RayServeException, KeyError):  # KeyError: deleted meanwhile
            handle = serve.get_deployment_handle("Directory", application)
            awaited: dict[Role, str] = handle.awaited.remote().result(timeout_s=STATUS_S)
            for role, words in awaited.items():
                if states[role] in (STARTING, READY):
                    states[role] = words.rpartition(", ")[0] or words  # without the seconds
    return states


def lacking(message: str) -> str:
    """The resources that a replica needs and the cluster lacks, by Serve's message about slow scheduling; else ""."""
    found = _RESOURCES.search(message)
    if found is None:
        return ""
    required, free = json.loads(found[1]), json.loads(found[2])
    return ", ".join(
        f"needs {amount:g} {name}, {free.get(name, 0):g} free"
        for name, amount in required.items()
        if amount > free.get(name, 0)
    )


def answers(url: str) -> bool:
    """True if the router answers over HTTP; without a key it may refuse."""
    try:
        return httpx.get(f"{url}/ready", timeout=STATUS_S).status_code in (200, 401)
    except httpx.TransportError:
        return False


def delete(applications: Sequence[str]) -> None:
    """Delete applications; returns once they are gone, or after STOP_S."""
    until = time.monotonic() + STOP_S
    with suppress(Exception):  # Ray may have ended already
        for name in applications:
            serve.delete(name, _blocking=False)
        while time.monotonic() < until and set(applications) & set(serve.status().applications):
            time.sleep(POLL_S / 5)


def adopt_orphans() -> None:
    """Become the parent of orphaned descendants (Linux), so that `end_children` finds them."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SUBREAPER, 1)


def end_children() -> None:
    """Kill all processes below this one."""
    until = time.monotonic() + END_S
    while (left := psutil.Process().children(recursive=True)) and time.monotonic() < until:
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=1)


def addresses(service: Service, config: ServiceConfig) -> str:
    """The addresses of what the service offers."""
    offers = {"playground": "/"} if config.router.playground else {}
    return ", ".join(
        f"{name} {service.url}{path}" for name, path in (offers | {"API": "/v1", "metrics": "/metrics"}).items()
    )


def schema_of(file: Path) -> ServeDeploySchema:
    """Parse a file that `check` has accepted."""
    schema: ServeDeploySchema = ServeDeploySchema.model_validate(read_mapping(file))
    return schema


@contextmanager
def own_terminal(verbose: bool) -> Iterator[tuple[Console, Path | None]]:
    """A console on the standard output, while everything else that this process prints goes to a new file.

    Output of native code and of Ray's other processes is included. verbose: all of it stays on the terminal.
    """
    if verbose:
        yield Console(), None
        return
    handle, name = tempfile.mkstemp(prefix="thinklogit-", suffix=".log")
    os.close(handle)
    log = os.open(name, os.O_WRONLY | os.O_APPEND)
    saved = os.dup(1), os.dup(2)
    try:
        with os.fdopen(os.dup(1), "w") as terminal:
            redirect(log, log)
            yield Console(file=terminal), Path(name)
    finally:
        redirect(*saved)
        for descriptor in (log, *saved):
            os.close(descriptor)


def redirect(output: int, errors: int) -> None:
    """Let standard output and standard error write to other file descriptors from now on."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(output, 1)
    os.dup2(errors, 2)


def limit_size(descriptor: int) -> None:
    """Empty an open file that has more than LOG_BYTES."""
    if os.fstat(descriptor).st_size > LOG_BYTES:
        os.ftruncate(descriptor, 0)


def in_foreground(descriptor: int) -> bool:
    """True if a file descriptor is the controlling terminal of this process, which is in its foreground group.

    rich takes a pipe for a terminal where FORCE_COLOR or TTY_COMPATIBLE is set.
    """
    try:
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    except OSError:
        return False


@contextmanager
def board(console: Console, *, plain: bool) -> Iterator[Board]:
    """A board on the console. plain: lines even on a terminal; a background job prints lines too."""
    if plain or not console.is_terminal or not in_foreground(console.file.fileno()):
        yield Board(console, None)
        return
    with Live(console=console) as live:
        yield Board(console, live)


if __name__ == "__main__":
    sys.exit(main())
