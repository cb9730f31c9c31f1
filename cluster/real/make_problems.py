"""Writes the problems of the tasks on real weights, with worked-out solutions, into `cluster/real/tasks`.

    python -m cluster.real.make_problems

`sums` and `capitals` are ours (cluster/real/sums.py, capitals.py). `legs`, of reasoning-gym (Apache-2.0), counts legs;
it has to be installed: `pip install reasoning-gym==0.1.25`, best in an environment of its own. The same versions
write the same files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from cluster.jobs.jsonl import write_file
from cluster.real import capitals, sums
from cluster.real.sums import Problem, Split

FOLDER = Path(__file__).parent / "tasks"
SIZES: dict[Split, int] = {"train": 1_200, "validation": 100, "test": 300}
KINDS, COUNTS = (2, 4), (1, 9)  # kinds of animals in a problem, and animals of a kind


def legs() -> Iterator[Problem]:
    """Leg counting of reasoning-gym: the knowledge is in the questions' animals, the reasoning in their sum."""
    import reasoning_gym
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    drawn = reasoning_gym.create_dataset(
        "leg_counting",
        seed=0,
        size=2 * sum(SIZES.values()),
        min_animals=KINDS[0],
        max_animals=KINDS[1],
        min_instances=COUNTS[0],
        max_instances=COUNTS[1],
    )
    taken = set()
    for entry in drawn:
        if entry["question"] not in taken:
            taken.add(entry["question"])
            steps, total = [], 0
            for animal, count in entry["metadata"]["animals"].items():
                each = count * ANIMALS[animal]
                steps.append(f"{count} {animal}{'s' * (count > 1)}: {count} x {ANIMALS[animal]} = {each}.")
                if len(steps) > 1:
                    steps.append(f"{total} + {each} = {total + each}.")
                total += each
            question = " ".join(entry["question"].split())
            thinking = f"Let's think step by step. {' '.join(steps)} The answer is {total}."
            yield Problem(question, thinking, entry["answer"])


def main() -> None:
    for task, made in (("sums", sums.problems), ("capitals", capitals.problems)):
        write_problems(task, {split: list(islice(made(split), size)) for split, size in SIZES.items()})
    drawn = legs()
    write_problems("legs", {split: list(islice(drawn, size)) for split, size in SIZES.items()})


def write_problems(task: str, found: Mapping[Split, Sequence[Problem]]) -> None:
    """Write the problems of all splits into the file of a task."""
    lines = [
        json.dumps({"id": f"{split}-{number}", "split": split} | asdict(problem)) + "\n"
        for split, drawn in found.items()
        for number, problem in enumerate(drawn)
    ]
    write_file(FOLDER / f"{task}.jsonl", "".join(lines).encode())


if __name__ == "__main__":
    main()
