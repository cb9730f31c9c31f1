"""vLLM's own OpenAI server of one model, as a process that `benchmarks.peers` compares the service with."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from actors.preflight import VLLM_PYTHON
from benchmarks.processes import thread_environment
from benchmarks.sse_client import await_answer
from benchmarks.subprocesses import last_lines, subprocess_of
from cluster.launch import LOOPBACK, free_port

START_S = 900.0  # it compiles and warms up
STOP_S = 30.0
# As for roles on vLLM: threads share the cores, and nothing is reported to anyone.
_SETTINGS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


class ServerFailed(RuntimeError):
    """vLLM's server did not start; the message has the end of its log."""


@contextmanager
def vllm_server(
    model: Path, name: str, context: int, cache_bytes: int, threads: int, start_s: float = START_S
) -> Iterator[tuple[str, int]]:
    """The base URL and the process id of a server that offers `model` as `name` in float32; it ends with the context.

    context: most tokens of a request. It keeps no prefixes of requests that have ended, as the service does.
    Raises ServerFailed if it ends, or does not answer within `start_s` seconds.
    """
    port = free_port()
    options = {
        "--host": LOOPBACK,
        "--port": port,
        "--served-model-name": name,
        "--dtype": "float32",
        "--max-model-len": context,
        "--kv-cache-memory-bytes": cache_bytes,
        "--generation-config": "vllm",  # not what the checkpoint recommends
    }
    # not `vllm serve`, which asks for the version of a package that builds for CPUs do not have
    command = [str(VLLM_PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += [str(word) for option in options.items() for word in option]
    command += ["--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
    url = f"http://{LOOPBACK}:{port}"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "vllm.log"
        environment = os.environ | _SETTINGS | thread_environment(threads)
        with log.open("w") as out, subprocess_of(command, environment, log, STOP_S, stdout=out) as process:
            try:
                await_answer(f"{url}/health", start_s, lambda: process.poll() is not None)
            except (EOFError, TimeoutError) as error:
                raise ServerFailed(f"vLLM's server of {model}: {error}; its log ends: {last_lines(log)}") from error
            yield url, process.pid
