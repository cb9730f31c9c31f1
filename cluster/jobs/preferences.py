"""Makes the pairs that ThinkLogit-DPO trains a guider on: samples target and guider, grades, and pairs.

    python -m cluster.jobs.preferences CONFIG.yaml [--run FOLDER] [--no-resume] [--dry-run]
    ray job submit --working-dir . -- python -m cluster.jobs.preferences CONFIG.yaml --run /shared/FOLDER

CONFIG.yaml is that of an evaluation on training problems, without modes and settings, and with `pairs`:

run: runs/preferences
service: ray_config.yaml
tasks: [{task: math_train, samples: 4}]
pairs: {most: 10000, per_problem: 4, min_chosen_tokens: 0, validation: 0.1}      # cluster/jobs/pairs.py has them all

The samples are kept and resumed as an evaluation's. Their pairs come to the folder's `pairs`: a saved `datasets` folder
with the splits train and validation in TRL's preference format, and a card that counts them. They follow from the
samples and `pairs` alone, so the same command with other `pairs` asks nothing again. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from actors.api.generation import ROLES
from actors.api.guidance import Guidance
from actors.config import ConfigError, ServiceConfig, load_config
from actors.preflight import load_tokenizers
from cluster.jobs.client import Item, plan_item
from cluster.jobs.config import Arm, Evaluation, checked, validated
from cluster.jobs.dry_run import dry_run
from cluster.jobs.evaluate import guarded, sample
from cluster.jobs.grading import grade
from cluster.jobs.pairs import SAMPLED, SPLITS, Kind, Pair, Pairing, PromptedProblem, Split, pairs
from cluster.jobs.results import Results, RunError
from cluster.jobs.workload import Workload
from cluster.serve_file import read_mapping

NOT_HERE = ("modes", "alpha", "warmup_tokens", "schedules", "expect")  # what an evaluation has and pairs do not


class WrongPair(RunError):
    """A chosen answer grades wrong, or a rejected one right."""


def load_preferences(path: Path) -> tuple[Evaluation, Pairing]:
    """What to sample and how to pair. Raises ConfigError that names every key that is wrong."""
    given = dict(read_mapping(path))
    pairing = validated(Pairing, given.pop("pairs", None) or {})
    if here := [key for key in NOT_HERE if key in given]:
        raise ConfigError(f"{', '.join(here)}: target and guider are asked alone; leave it out")
    return checked(given | {"modes": list(SAMPLED)}), pairing


def prompted_problems(workload: Workload, service: ServiceConfig) -> list[PromptedProblem]:
    """Every problem with what each role reads when it is asked guided, as text in which special tokens stand."""
    tokenizers = load_tokenizers(service)
    guided = Arm("guided", "a1", Guidance(1.0))
    prompted = []
    for task, problems in workload.tasks:
        for problem in problems:
            ids = plan_item(Item(task, problem, guided, 0, 0), service, tokenizers).prompts
            prompts = {role: tokenizers[role].decode(ids[role], skip_special=False) for role in ROLES}
            prompted.append(PromptedProblem(task.name, problem.id, problem.question, prompts))
    return prompted


def check_grades(made: Mapping[Split, Sequence[Pair]], workload: Workload) -> None:
    """Grade both answers of every pair anew. Raises WrongPair."""
    graders = {task.name: task.grader for task, _ in workload.tasks}
    gold = {(row.task, row.problem): row.answer for row in workload.problem_rows()}
    for pair in (pair for split in made.values() for pair in split):
        task, problem = pair.problem.task, pair.problem.id
        for one, wanted in ((pair.chosen, True), (pair.rejected, False)):
            if grade(graders[task], one.text, gold[task, problem]).right != wanted:
                raise WrongPair(
                    f"{task}, problem {problem}: the answer {one.key} is {'not ' * wanted}right when it is graded again"
                )


def write(made: Mapping[Split, Sequence[Pair]], counts: Mapping[str, Any], folder: Path) -> None:
    """Save the splits and their card as `folder`, which is replaced as a whole. Raises RunError where one is empty."""
    from datasets import Dataset, DatasetDict, disable_progress_bars  # seconds of import

    disable_progress_bars()
    if empty := [split for split in SPLITS if not made[split]]:
        raise RunError(
            f"no pair came out for {' and '.join(empty)}: target and guider must differ in what they get right. "
            f"Take more problems or samples, or lower pairs.min_chosen_tokens ({json.dumps(counts['samples'])})"
        )
    fresh = folder.with_name(folder.name + ".part")
    shutil.rmtree(fresh, ignore_errors=True)
    DatasetDict({split: Dataset.from_list([pair.row() for pair in made[split]]) for split in SPLITS}).save_to_disk(
        fresh
    )
    (fresh / "counts.json").write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    (fresh / "README.md").write_text(card(counts), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def count(
    made: Mapping[Split, Sequence[Pair]], results: Results, pairing: Pairing, service: ServiceConfig
) -> dict[str, Any]:
    """What the card says: samples and how many are right, pairs, problems and lengths."""
    samples: dict[str, dict[str, int]] = {mode: {"answers": 0, "right": 0, "cut": 0} for mode in SAMPLED}
    for one in results.samples():
        row = samples[one.key.mode]
        row["answers"] += 1
        row["right"] += one.right
        row["cut"] += one.finish == "length"
    return {
        "models": {role: service.models.role(role).path for role in ROLES},
        "samples": samples,
        "problems": {split: len({pair.problem.question for pair in made[split]}) for split in SPLITS},
        "pairs": {split: {kind: len(_of(made[split], kind)) for kind in pairing.kinds} for split in SPLITS},
        "tokens": {kind: _lengths([p for split in SPLITS for p in _of(made[split], kind)]) for kind in pairing.kinds},
        "pairing": pairing.model_dump(mode="json"),
    }


def card(counts: Mapping[str, Any]) -> str:
    """The counts for a reader."""
    models, samples, pairs_, tokens = (counts[key] for key in ("models", "samples", "pairs", "tokens"))
    lines = [
        "# Preference pairs for ThinkLogit-DPO",
        "",
        "A right answer (`chosen`) and a wrong one (`rejected`) to the same problem, one of them the target's and the",
        "other the guider's. `prompt` is what the guider read, special tokens included; `chosen_finished` and",
        "`rejected_finished` say whether an answer ended by itself, so that its end belongs to what is learnt.",
        "",
        "| answers of | model | answers | right | cut at their greatest length |",
        "|---|---|---|---|---|",
        *(
            f"| {mode} | {models[mode]} | {row['answers']:,} | {row['right'] / max(1, row['answers']):.1%} "
            f"| {row['cut']:,} |"
            for mode, row in samples.items()
        ),
        "",
        "| pairs | train | validation | chosen, tokens (10 %, median, 90 %) | rejected |",
        "|---|---|---|---|---|",
        *(
            f"| {kind} | {pairs_['train'][kind]:,} | {pairs_['validation'][kind]:,} "
            f"| {_three(tokens[kind]['chosen'])} | {_three(tokens[kind]['rejected'])} |"
            for kind in tokens
        ),
        f"| of problems | {counts['problems']['train']:,} | {counts['problems']['validation']:,} | | |",
        "",
        "No problem stands in both splits. Made with:",
        "",
        "```json",
        json.dumps(counts["pairing"]),
        "```",
    ]
    return "\n".join(lines) + "\n"


def table(counts: Mapping[str, Any]) -> Table:
    """Pairs by kind and split."""
    shown = Table("pairs", *SPLITS)
    for kind in counts["tokens"]:
        shown.add_row(kind, *(f"{counts['pairs'][split][kind]:,}" for split in SPLITS))
    return shown


def run(evaluation: Evaluation, pairing: Pairing, console: Console, *, resume: bool = True) -> dict[str, Any]:
    """Sample what is missing and make the pairs; what the last line says."""
    workload = sample(evaluation, console, resume=resume)
    results = Results(evaluation.run)
    service = load_config(results.config()["service"])  # that which answered
    made = pairs(results.samples(), prompted_problems(workload, service), pairing)
    check_grades(made, workload)
    counts = count(made, results, pairing, service)
    folder = evaluation.run / "pairs"
    write(made, counts, folder)
    console.print(table(counts))
    return {"pairs": str(folder)} | {key: counts[key] for key in ("samples", "problems")} | {"counts": counts["pairs"]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the pairs, or with --dry-run only resolve what would be asked; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="the YAML file")
    parser.add_argument("--run", type=Path, help="the folder of samples and pairs, instead of the file's `run`")
    parser.add_argument("--no-resume", action="store_true", help="throw away what the folder holds, and start over")
    parser.add_argument("--dry-run", action="store_true", help="resolve every name and field; download and ask nothing")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)

    def work() -> dict[str, Any]:
        evaluation, pairing = load_preferences(options.config)
        if options.run is not None:
            evaluation = evaluation.model_copy(update={"run": options.run})
        if options.dry_run:
            return dry_run(evaluation, console)
        return run(evaluation, pairing, console, resume=not options.no_resume)

    status, result = guarded(work, console)
    if status == 0:
        print(json.dumps(result), flush=True)
    return status


def _of(made: Sequence[Pair], kind: Kind) -> list[Pair]:
    return [pair for pair in made if pair.kind == kind]


def _lengths(made: Sequence[Pair]) -> dict[str, list[float]]:
    """Tokens of both answers: the 10th, 50th and 90th percentile."""
    if not made:
        return {"chosen": [], "rejected": []}
    tokens = {"chosen": [pair.chosen.tokens for pair in made], "rejected": [pair.rejected.tokens for pair in made]}
    return {name: np.percentile(values, (10, 50, 90)).tolist() for name, values in tokens.items()}


def _three(values: Sequence[float]) -> str:
    return ", ".join(f"{value:,.0f}" for value in values)


if __name__ == "__main__":
    sys.exit(main())
