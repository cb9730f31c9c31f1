"""A step of the native engine, of the vLLM engine and of vLLM's own loop, interleaved, on this machine's CPU.

    python -m benchmarks.engines [--model FOLDER] [--rounds 7] [--threads 2] [--save]

Each engine has a process of its own (`benchmarks.engine_worker`), float32 weights and the same number of threads, and
only one computes at a time. Steps of 1, 8 and 32 sessions that hold 256 tokens each decode a token, or check 5 drafts.
The model is SmolLM2-135M-Instruct if `python -m cluster.real --fetch` brought it, else the embedded target. The last
line is a JSON list: medians over the rounds of ratios of the steps' times. vLLM's own loop also chooses tokens, and
checks no drafts. Needs `make venv-vllm`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from threading import Timer
from typing import Any

from rich.table import Table

from actors.preflight import VLLM_PYTHON
from benchmarks.results_file import arguments, console, progress, publish
from cluster.real.models import SMOLLM2, fetched

KINDS = ("native", "vllm", "generate")
STEPS = ((1, 1), (8, 1), (32, 1), (1, 5), (8, 5))  # sessions, tokens of each
REPEAT = 5  # steps in a round
ANSWER_S = 600.0  # a worker that loads or computes for longer is ended
ROOT = Path(__file__).parent.parent
DEMO = ROOT / "cluster" / "demo" / "weights" / "target"


class EngineProcess:
    """A worker that answers one request at a time."""

    def __init__(self, kind: str, process: subprocess.Popen[str], errors: Path) -> None:
        self._kind, self._process, self._errors = kind, process, errors

    def ask(self, sessions: int, tokens: int, repeat: int) -> list[float] | None:
        """Seconds of each step; None if the kind has no such step. Raises RuntimeError if the worker has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([sessions, tokens, repeat]) + "\n")
        self._process.stdin.flush()
        took: list[float] | None = json.loads(self.line())
        return took

    def line(self) -> str:
        """The next line of the worker. Raises RuntimeError with its last error if it has ended."""
        assert self._process.stdout is not None
        late = Timer(ANSWER_S, self._process.kill)
        late.start()
        line = self._process.stdout.readline()
        late.cancel()
        if not line:
            raise RuntimeError(f"{self._kind} ended: {self._errors.read_text().strip().splitlines()[-1:]}")
        return line


@contextmanager
def running(kind: str, model: Path, sessions: int, threads: int, folder: Path) -> Iterator[EngineProcess]:
    """A worker with its model loaded; it ends with the context."""
    python = sys.executable if kind == "native" else str(VLLM_PYTHON)
    command = [python, "-m", "benchmarks.engine_worker", kind, str(model), str(sessions)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "VLLM_LOGGING_LEVEL": "ERROR"}
    errors = folder / f"{kind}.log"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with errors.open("w") as log:
        process = subprocess.Popen(command, stderr=log, env=environment, cwd=ROOT, **pipes)  # noqa: S603
    try:
        worker = EngineProcess(kind, process, errors)
        assert worker.line() == "ready\n"
        yield worker
    finally:
        process.kill()
        process.communicate()


def measure(model: Path, rounds: int, threads: int) -> dict[tuple[int, int], dict[str, list[float]]]:
    """By step and kind the median seconds of each round. Raises RuntimeError if a worker ends."""
    found: dict[tuple[int, int], dict[str, list[float]]] = {step: {} for step in STEPS}
    most = max(sessions for sessions, _ in STEPS)
    with ExitStack() as stack, progress(console()) as bar:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = {kind: stack.enter_context(running(kind, model, most, threads, folder)) for kind in KINDS}
        for step in STEPS:  # warm
            for worker in workers.values():
                worker.ask(*step, 2)
        for number in bar.track(range(rounds), description="rounds"):
            for step in STEPS:
                for kind in KINDS[number % 3 :] + KINDS[: number % 3]:
                    if (took := workers[kind].ask(*step, REPEAT)) is not None:
                        found[step].setdefault(kind, []).append(median(took))
    return found


def result(step: tuple[int, int], rounds: dict[str, list[float]]) -> dict[str, Any]:
    """The JSON object of a step: medians of the rounds' ratios; null for a check of drafts over vLLM's own loop."""

    def ratio(first: str, second: str) -> float | None:
        if second not in rounds:
            return None
        return round(median(a / b for a, b in zip(rounds[first], rounds[second], strict=True)), 3)

    both = {"vllm_over_generate": ratio("vllm", "generate"), "native_over_vllm": ratio("native", "vllm")}
    return {"sessions": step[0], "tokens": step[1], **both}


def table(model: str, found: dict[tuple[int, int], dict[str, list[float]]]) -> Table:
    """Milliseconds and ratios of every step."""
    shown = Table(
        "sessions x tokens", *(f"{kind}, ms" for kind in KINDS), "vllm / generate", "native / vllm", title=model
    )
    for step, rounds in found.items():
        times = [f"{1e3 * median(rounds[kind]):.1f}" if kind in rounds else "" for kind in KINDS]
        ratios = result(step, rounds)
        cells = [ratios["vllm_over_generate"], ratios["native_over_vllm"]]
        shown.add_row(f"{step[0]} x {step[1]}", *times, *("" if cell is None else f"{cell:.2f}" for cell in cells))
    return shown


def main(arguments_: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, help="a checkpoint's folder")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each engine (all cores)")
    options = parser.parse_args(arguments_)
    if not VLLM_PYTHON.exists():
        print("there is no vLLM: run `make venv-vllm`", file=sys.stderr)
        return 1
    model = options.model or fetched(SMOLLM2) or DEMO
    found = measure(model.resolve(), options.rounds, options.threads)
    console().print(table(model.name, found))
    details = [{"sessions": s, "tokens": t, "seconds": rounds} for (s, t), rounds in found.items()]
    publish("engines", [result(step, rounds) for step, rounds in found.items()], options.save, details)
    return 0


if __name__ == "__main__":
    sys.exit(main())
