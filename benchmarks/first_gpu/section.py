"""One section of the first run on a GPU, in this process.

    python -m benchmarks.first_gpu.section NAME [--small]

Each line on standard output is a JSON object with its `finding`; the last one is "end". What libraries print goes to
standard error.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from benchmarks.first_gpu.device import CUDA, Say, environment, peak_mib
from benchmarks.first_gpu.engines import LARGE, SMALL, Kind, engine_section
from benchmarks.first_gpu.operators import attention, rows
from benchmarks.first_gpu.sharing import roles, service

Run: TypeAlias = Callable[[Say, bool], None]  # small: tiny models


@dataclass(frozen=True, slots=True)
class Section:
    """What is run, and about the seconds that it takes on an H200; its deadline is twice as long."""

    run: Run
    seconds: float
    gpu: bool = False  # it needs one
    vllm: bool = False  # it needs vLLM
    service: bool = False  # its processes choose their environments themselves
    large: bool = False  # with tiny models it repeats the section of the small model


def sections_of(kind: Kind, seconds: tuple[float, float, float, float]) -> dict[str, Section]:
    """The sections of an engine. seconds: of the small model, the large one, a service, roles that share a GPU."""
    small, large, serving, sharing = seconds
    vllm = kind == "vllm"
    return {
        f"{kind}-1.5B": Section(lambda say, tiny: engine_section(kind, SMALL, tiny, say), small, vllm=vllm),
        f"{kind}-32B": Section(lambda say, tiny: engine_section(kind, LARGE, tiny, say), large, vllm=vllm, large=True),
        f"{kind}-service": Section(lambda say, tiny: service(kind, tiny, say), serving, vllm=vllm, service=True),
        f"{kind}-roles": Section(lambda say, tiny: roles(kind, tiny, say), sharing, vllm=vllm),
    }


SECTIONS = {  # those of which most is expected come first
    "environment": Section(lambda say, tiny: environment(say), 10),
    "attention": Section(lambda say, tiny: attention(say), 40, gpu=True),
    "rows": Section(lambda say, tiny: rows(say, *((1_000, (1, 8)) if tiny else ())), 20),
    **sections_of("vllm", (50, 80, 110, 80)),
    **sections_of("native", (40, 80, 90, 60)),
}


def main() -> int:
    name, tiny = sys.argv[1], "--small" in sys.argv
    answers, status = os.fdopen(os.dup(1), "w"), 0
    os.dup2(2, 1)

    def say(finding: str, **facts: Any) -> None:
        print(json.dumps({"finding": finding, **facts}, default=str), file=answers, flush=True)

    try:
        SECTIONS[name].run(say, tiny)
    except ImportError as error:
        say("skipped", why=f"a package is missing: {error}")
    except Exception as error:
        status = 1
        where = [line.strip() for line in traceback.format_exc().splitlines()[-7:-1]]
        say("failed", why=f"{type(error).__name__}: {error}"[:600], where=where)
    if CUDA:
        say("memory", peak_mib=peak_mib())
    say("end")
    return status


if __name__ == "__main__":
    sys.exit(main())
