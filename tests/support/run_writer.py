"""A process that writes a synthetic run: `python -m tests.support.run_writer FOLDER SECONDS`.

It appends the missing samples in a random order, sleeps SECONDS after each of them, and finishes the run.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

from cluster.jobs.results import ProblemRow, Results
from cluster.jobs.sample import ALONE, Key, Mode, Sample, Timing

CONFIG = {"run": "somewhere", "tasks": [{"name": "sums", "samples": 3}], "seeds": [1, 2], "concurrency": 8}
PROBLEMS = tuple(ProblemRow("sums", f"{number:02}", f"What is {number} + 1?", str(number + 1)) for number in range(20))
ARMS: tuple[tuple[Mode, str], ...] = (("target", ALONE), ("guided", "a1"))
KEYS = frozenset(
    Key("sums", problem.problem, mode, setting, seed, number)
    for problem in PROBLEMS
    for mode, setting in ARMS
    for seed in (1, 2)
    for number in range(3)
)


def sample(key: Key) -> Sample:
    """A sample that depends only on its key: some kilobytes of text with non-ASCII characters and line ends."""
    random_ = random.Random(repr(key))
    text = "".join(random_.choices("so ≈ √2\n\u2028", k=random_.randrange(1, 8_000)))
    return Sample(key, text, None, random_.random() < 0.5, "stop", 10, len(text), 0, 0, 0)


def timing(key: Key) -> Timing:
    return Timing(key, random.Random(repr(key)).random(), 0, 0)


def main() -> None:
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    with Results(folder).writing(CONFIG, PROBLEMS) as results:
        missing = sorted(KEYS - results.done())
        random.Random(os.getpid()).shuffle(missing)
        for key in missing:
            results.append(sample(key), timing(key))
            time.sleep(seconds)
        results.finish()


if __name__ == "__main__":
    main()
