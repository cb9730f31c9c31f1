"""Runs what a GPU alone can show: the operator, both engines, roles that share a GPU, a service. About 8 minutes.

    python -m benchmarks.first_gpu [--small] [--sections NAME ...] [--budget 470] [--save]

Each section is a process of its own with a deadline; one that fails, or does not fit the rest of the budget, is
reported, and the next one runs. Each line of the output is a JSON object with a finding: `t` are seconds since the
start. Sections of vLLM are skipped where it is not installed: in this environment, or by `make venv-vllm`. The last
line tells how each section ended. --small: a dry run with tiny models, which a CPU can do. Exit status 1: a section
failed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from subprocess import PIPE, Popen
from threading import Event, Timer
from typing import Any

from benchmarks.first_gpu.device import CUDA
from benchmarks.first_gpu.section import SECTIONS, Section
from benchmarks.results_file import arguments, publish
from benchmarks.subprocesses import kill, last_lines, subprocess_of

ROOT = Path(__file__).parents[2]
BUDGET_S, SMALL_S = 470.0, 900.0  # of all sections; of each one with tiny models, on any CPU
Tell = Callable[[dict[str, Any]], None]


def run_section(command: Sequence[str], deadline_s: float, tell: Tell) -> str:
    """Run one section, and pass its findings on. Returns "done", "skipped" or "failed"."""
    outcome, late = "done", Event()

    def expire(process: Popen[str]) -> None:
        late.set()
        kill(process)

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "stderr.log"
        with subprocess_of(command, os.environ, log, stdout=PIPE, cwd=ROOT) as process:
            timer = Timer(deadline_s, expire, [process])
            timer.start()
            assert process.stdout is not None
            for fact in map(json.loads, process.stdout):
                if fact["finding"] == "end":  # what is left of its processes ends with the context
                    timer.cancel()
                    return outcome
                outcome = fact["finding"] if fact["finding"] in ("skipped", "failed") else outcome
                tell(fact)
            timer.cancel()
        why = f"it did not end within {deadline_s:g} s" if late.is_set() else f"its status is {process.returncode}"
        tell({"finding": "failed", "why": f"{why}; its log ends: {last_lines(log)}"})
    return "failed"


def vllm_python() -> Path | None:
    """The Python that has vLLM, if there is one."""
    if find_spec("vllm"):
        return Path(sys.executable)
    with suppress(ImportError):  # the native engine needs fewer packages
        from actors.preflight import VLLM_PYTHON

        return VLLM_PYTHON if VLLM_PYTHON.exists() else None
    return None


def reason_to_skip(section: Section, small: bool, left_s: float) -> str | None:
    """Why a section is not run; None if it is. left_s: of the budget."""
    if section.gpu and not CUDA:
        return "it needs a GPU"
    if section.vllm and vllm_python() is None:
        return "vLLM is not installed: run `make venv-vllm`, or start this where vLLM for GPUs is installed"
    if small:
        return "with tiny models it would repeat another section" if section.large else None
    short = section.seconds > left_s
    return f"it takes about {section.seconds:g} s, and {left_s:.0f} s of the budget are left" if short else None


def run(sections: Mapping[str, Section], small: bool, budget_s: float, tell: Tell) -> dict[str, str]:
    """Run sections one after another. Returns how each one ended."""
    began, outcomes = time.monotonic(), dict[str, str]()
    for name, section in sections.items():

        def tell_of(fact: dict[str, Any], name: str = name) -> None:
            tell({"t": round(time.monotonic() - began, 1), "section": name} | fact)

        left_s = budget_s - (time.monotonic() - began)
        if why := reason_to_skip(section, small, left_s):
            outcomes[name] = "skipped"
            tell_of({"finding": "skipped", "why": why})
            continue
        python = vllm_python() if section.vllm and not section.service else None
        command = [str(python or sys.executable), "-m", "benchmarks.first_gpu.section", name]
        deadline_s = SMALL_S if small else min(2 * section.seconds, left_s)
        outcomes[name] = run_section([*command, "--small"] if small else command, deadline_s, tell_of)
    return outcomes


def main(given: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--small", action="store_true", help="a dry run with tiny models")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what is run (all)")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds of all sections (470)")
    options = parser.parse_args(given)
    if not (CUDA or options.small):
        print("torch sees no GPU: install torch for CUDA, or pass --small for a dry run", file=sys.stderr)
        return 1
    findings: list[dict[str, Any]] = []

    def tell(finding: dict[str, Any]) -> None:
        findings.append(finding)
        print(json.dumps(finding), flush=True)

    chosen = {name: section for name, section in SECTIONS.items() if name in options.sections}
    outcomes = run(chosen, options.small, options.budget, tell)
    publish("first_gpu", outcomes, options.save, findings)
    return int("failed" in outcomes.values())


if __name__ == "__main__":
    sys.exit(main())
