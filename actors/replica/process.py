"""Settings of a process: how long OpenMP workers spin, how often Python collects garbage, and what it gives back.

torch computes on the CPU with libgomp, which has a team of worker threads for each thread that has computed.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

# Rounds, of about 50 ns, that an OpenMP worker spins before it sleeps. The parallel regions of one forward follow each
# other within that time; between forwards the other models on the same cores need them. Measured with 12 layers x 768
# and two models of 4 layers x 256 on 2 cores: without spinning the large model alone takes 1.3 times as long; libgomp's
# default, thirty times as many rounds, takes the cores from the small models.
SPIN = ("GOMP_SPINCOUNT", "10000")


# New objects before Python collects the youngest generation; collections of each generation before the next older one.
COLLECT = (50_000, 20, 100)


def collect_rarely() -> None:
    """Collect cyclic garbage less often, and never examine the objects that exist now.

    A coordinator creates dozens of small objects per token. Python's default, a collection every 700 objects, takes a
    tenth of its time. In exchange, some megabytes of garbage may wait for a collection.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT)


def return_freed_memory() -> None:
    """Give the system the memory that the C library keeps for reuse: 170 MB after a tokenizer of 262,144 tokens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)


def spin_briefly() -> None:
    """Set how long OpenMP workers spin, unless the user has. Has no effect once torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault(*SPIN)


def on_temporary_thread(make: Callable[[], T]) -> T:
    """Call `make` on a thread that then ends; return or raise its outcome. Blocks.

    A team of OpenMP workers lives as long as the thread it belongs to. If all teams together have more threads than
    there are cores, workers sleep at once, and a forward takes 1.4 times as long (the large model above). A model is
    therefore loaded on a temporary thread, which leaves no team, and computes on another.
    """
    with ThreadPoolExecutor(1, "passing") as thread:
        return thread.submit(make).result()
