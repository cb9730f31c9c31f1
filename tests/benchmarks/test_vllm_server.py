"""vLLM's server as a process: it is waited for, its end is explained, and it ends with all of its processes."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks import vllm_server as module
from benchmarks.subprocesses import kill, subprocess_of
from benchmarks.vllm_server import ServerFailed, vllm_server
from tests.support.deadlines import HANG_S

SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(" ".join(sys.argv).encode())

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Healthy).serve_forever()
"""


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Run `code` in place of vLLM's Python."""
    program = folder / "python"
    program.write_text(f"#!{sys.executable}\n{code}")
    program.chmod(0o700)
    monkeypatch.setattr(module, "VLLM_PYTHON", program)


def runs(process: int) -> bool:
    """True if a process is there and no zombie."""
    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_the_server_answers_and_ends_with_the_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, SERVER)
    with vllm_server(Path("/a/model"), "peer", 2_048, 1 << 20, 2, HANG_S) as (url, process):
        command = httpx.get(f"{url}/health").text.split()
        assert command[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", "/a/model"]
        assert command[command.index("--dtype") + 1] == "float32"
        assert psutil.pid_exists(process)
    assert not psutil.pid_exists(process)


def test_a_server_that_ends_or_never_answers_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code, start_s, why in (
        ("raise SystemExit('no such model')", HANG_S, "has ended; its log ends: no such model"),
        ("import time; time.sleep(600)", 0.5, "did not answer within 0.5 s"),
    ):
        stand_in(tmp_path, monkeypatch, code)
        with pytest.raises(ServerFailed, match=why), vllm_server(Path("a"), "peer", 64, 1, 1, start_s):
            pass


def test_a_process_that_ignores_the_request_to_end_is_killed_with_its_children(tmp_path: Path) -> None:
    code = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True).pid, flush=True)
time.sleep(600)
"""
    with subprocess_of([sys.executable, "-c", code], os.environ, tmp_path / "log", 0.1, stdout=-1) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
    assert process.returncode == -9
    until = time.monotonic() + HANG_S
    while runs(child):
        assert time.monotonic() < until
        time.sleep(0.01)
    kill(process)  # once more: nothing is left
