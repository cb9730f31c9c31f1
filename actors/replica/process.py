"""What a process of the service sets for itself: how its helpers wait, and how often Python looks for garbage.

Helpers are threads of libgomp, which computes for torch on the CPU: a team of them for each thread that has computed.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

# Rounds, of about 50 ns, that a helper waits awake for its next piece of work. A forward's pieces follow one another
# within that; between forwards other models on the same cores need them. 12 layers x 768 and two models of 4 x 256 on 2
# cores: asleep between pieces the large one alone takes 1.3 times as long; libgomp's own choice, thirty times more
# rounds, takes the cores from the small ones.
SPIN = ("GOMP_SPINCOUNT", "10000")


# Objects made before Python looks for cycles among the youngest, and how many such looks before it looks at older ones.
COLLECT = (50_000, 20, 100)


def collect_rarely() -> None:
    """Look for cyclic garbage less often; what is there already is never looked at again.

    A coordinator makes dozens of small objects a token. Looking after every 700, as Python does, costs it a tenth of
    its time; between two looks some megabytes wait.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT)


def spin_briefly() -> None:
    """Set how long helpers wait awake, unless the user has. Call before torch is imported: later it does nothing."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault(*SPIN)


def on_temporary_thread(make: Callable[[], T]) -> T:
    """What `make` returns or raises, called on a thread that ends then. Blocks.

    A team lives as long as its thread. Where all teams together have more threads than there are cores, helpers fall
    asleep at once, and a forward takes 1.4 times as long (the large model above). A model is therefore loaded on a
    thread that leaves no team behind, and computes on another.
    """
    with ThreadPoolExecutor(1, "passing") as thread:
        return thread.submit(make).result()
